import base64
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

import config
from config import Settings, SettingsError, load
from tests.support.settings import SECRET


def key(size: int = 24) -> bytes:
    return bytes(range(7, 7 + size))


def secret(raw: bytes) -> str:
    return f"whsec_{base64.b64encode(raw).decode()}"


# Each variable with what it takes, and what becomes of it.
GOOD: list[tuple[str, str, Any]] = [
    ("PORT", "0", 0),
    ("PORT", "65535", 65535),
    ("WEB_WORKERS", "1", 1),
    ("MAX_BODY_BYTES", "2048", 2048),
    ("HOST", "::1", "::1"),
    ("HOST", "[::]", "::"),
    ("HOST", "localhost", "127.0.0.1"),
    ("DB_POOL_SIZE", "200", 200),
    ("DB_MAX_OVERFLOW", "0", 0),
    ("DB_POOL_TIMEOUT", "0.5", 0.5),
    ("BATCH_SIZE", "1", 1),
    ("BATCH_SIZE", "500", 500),
    ("SHUTDOWN_SECONDS", "5", 5),
    ("USER_DELETION", "anonymize", "anonymize"),
    ("ROLE_SOURCE", "none", "none"),
    ("ROLE_METADATA_KEY", "level", "level"),
    ("ORGANIZATION_SOURCE", "none", "none"),
    ("ORGANIZATION_METADATA_KEY", "company", "company"),
    ("ORGANIZATION_METADATA_KEY", "https://app.example/the company", "https://app.example/the company"),
    ("EVENT_RETENTION_DAYS", "1", 1),
    ("SILENCE_ALARM_MINUTES", "30", 30),
    ("LOG_LEVEL", "DEBUG", "DEBUG"),
    ("LOG_FORMAT", "json", "json"),
    ("CLERK_INSTANCE_ID", "ins_1", "ins_1"),
    ("CLERK_API_URL", "http://127.0.0.1:9", "http://127.0.0.1:9"),
    (
        "DATABASE_URL",
        "postgres://u:p@h:5432/d?sslmode=require",
        SecretStr("postgres://u:p@h:5432/d?sslmode=require"),
    ),
    ("DATABASE_URL", "postgresql://h/d", SecretStr("postgresql://h/d")),
    ("DATABASE_URL", "postgresql://u:p?w@h/d", SecretStr("postgresql://u:p?w@h/d")),
    ("DATABASE_URL_UNPOOLED", "postgres://h/d", SecretStr("postgres://h/d")),
    ("REDIS_URL", "redis://:p@h:6379/0", SecretStr("redis://:p@h:6379/0")),
    ("REDIS_URL", "rediss://h", SecretStr("rediss://h")),
    ("REDIS_URL", "unix:///run/redis.sock", SecretStr("unix:///run/redis.sock")),
    ("CONSOLE_PASSWORD", "open sesame", SecretStr("open sesame")),
    ("CLERK_SECRET_KEY", "sk_test_1", SecretStr("sk_test_1")),
]
BAD: list[tuple[str, str]] = [
    ("PORT", "-1"),
    ("PORT", "65536"),
    ("PORT", "http"),
    ("WEB_WORKERS", "0"),
    ("WEB_WORKERS", "two"),
    ("MAX_BODY_BYTES", "10"),
    ("HOST", "example.com"),
    ("HOST", "127.0.0.1:80"),
    ("MAX_BODY_BYTES", "1MiB"),
    ("DB_POOL_SIZE", "0"),
    ("DB_POOL_SIZE", "1.5"),
    ("DB_MAX_OVERFLOW", "-1"),
    ("DB_POOL_TIMEOUT", "0"),
    ("DB_POOL_TIMEOUT", "nan"),
    ("DB_POOL_TIMEOUT", "inf"),
    ("BATCH_SIZE", "0"),
    ("BATCH_SIZE", "501"),
    ("SHUTDOWN_SECONDS", "-1"),
    ("USER_DELETION", "forget"),
    ("USER_DELETION", "DELETE FROM users"),
    ("ROLE_SOURCE", "unsafe_metadata"),
    ("ORGANIZATION_SOURCE", "email"),
    ("EVENT_RETENTION_DAYS", "0"),
    ("EVENT_RETENTION_DAYS", "a month"),
    ("EVENT_RETENTION_DAYS", "1000000"),
    ("SILENCE_ALARM_MINUTES", "0"),
    ("LOG_LEVEL", "VERBOSE"),
    ("LOG_FORMAT", "xml"),
    ("CLERK_API_URL", "api.clerk.example"),
    ("CLERK_INSTANCE_ID", '"ins_2abc"'),
    ("CLERK_INSTANCE_ID", "ins_2abc,ins_2def"),
    ("ROLE_METADATA_KEY", '"role"'),
    ("ORGANIZATION_METADATA_KEY", "'company'"),
    ("DATABASE_URL", "mysql://hunter2@h/d"),
    ("DATABASE_URL", "hunter2"),
    ("DATABASE_URL", "replace_me"),
    ("DATABASE_URL", "postgresql://u:hunter2@h:port/d"),
    ("DATABASE_URL", "postgresql://u:hunter2@[h/d"),
    ("DATABASE_URL", "postgresql://u:p@hunter2@h:5432/d"),
    ("DATABASE_URL", "postgresql://u:p@hunter2:w@h/d"),
    ("DATABASE_URL_UNPOOLED", "http://hunter2@h/d"),
    ("REDIS_URL", "http://hunter2@h"),
    ("REDIS_URL", "h:6379"),
    ("REDIS_URL", "redis://:hunter2@h:port"),
    ("REDIS_URL", "redis://:hunter2@h..example"),
    ("REDIS_URL", f"redis://:hunter2@{'h' * 64}"),
    ("CLERK_API_URL", "https://hunter2..example"),
    ("CLERK_SECRET_KEY", "sk_test hunter2"),
]
BAD_SECRETS = {
    "no prefix": base64.b64encode(key()).decode(),
    "another prefix": f"whpk_{base64.b64encode(key()).decode()}",
    "nothing after it": "whsec_",
    "the example's": "whsec_replace_me",
    "the documentation's": "whsec_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX",
    "a placeholder in words": "whsec_yourSecretHere1234567890abcdefgh",
    "another": "whsec_YOURCLERKWEBHOOKSECRET1234567890",
    "zeros": secret(bytes(24)),
    "cut short": secret(key())[:20],
    "cut so that it is no base64": secret(key())[:-3],
    "with quotes": f'"{secret(key())}"',
    "another alphabet": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa--",
    "not ASCII": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSé",
    "too short a key": secret(key(15)),
}


@pytest.mark.parametrize(("variable", "value", "read"), GOOD)
def test_a_good_value_is_read(
    variable: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert getattr(load(), variable.lower()) == read


@pytest.mark.parametrize(("variable", "value"), BAD)
def test_a_bad_value_is_refused_with_a_line_that_names_the_variable_and_not_the_value(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as refused:
        load()
    message = str(refused.value)
    assert message.startswith((f"{variable} ", f"{variable}: "))
    assert "\n" not in message
    assert "hunter2" not in message
    assert len(value) < 4 or value not in message
    assert refused.value.retryable is False
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@pytest.mark.parametrize("value", BAD_SECRETS.values(), ids=BAD_SECRETS.keys())
def test_a_signing_secret_that_is_none_is_refused_and_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", value)
    with pytest.raises(SettingsError, match=r"^CLERK_WEBHOOK_SIGNING_SECRET[ :]") as refused:
        load()
    assert value.removeprefix("whsec_") == "" or value.removeprefix("whsec_") not in str(refused.value)


@pytest.mark.parametrize("separator", [",", " ", ", ", "\n", " ,  "])
def test_several_signing_secrets_are_read_in_their_order(
    separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = secret(key())
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", f" {SECRET}{separator}{other},")
    assert load().signing_keys == (base64.b64decode(SECRET.removeprefix("whsec_")), key())


def test_one_bad_secret_among_good_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", f"{SECRET},whsec_replace_me")
    with pytest.raises(SettingsError, match="is a placeholder"):
        load()


def test_nothing_set_is_nothing_wrong_and_every_default_stands() -> None:
    settings = load()
    assert settings.signing_keys == ()
    assert settings.database_url is settings.redis_url is settings.clerk_secret_key is None
    assert (settings.port, settings.batch_size, settings.event_retention_days) == (8000, 400, 30)
    assert (settings.user_deletion, settings.role_source, settings.log_format) == ("delete", "metadata", None)


def test_what_a_command_needs_is_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as refused:
        load("clerk_webhook_signing_secret", "redis_url", "database_url")
    assert str(refused.value) == (
        "CLERK_WEBHOOK_SIGNING_SECRET is not set; REDIS_URL is not set; DATABASE_URL is not set"
    )
    monkeypatch.setenv("REDIS_URL", "redis://h")
    with pytest.raises(SettingsError, match=r"^DATABASE_URL is not set$"):
        load("redis_url", "database_url")


def test_an_empty_value_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "")
    monkeypatch.setenv("BATCH_SIZE", "")
    assert load().batch_size == 400
    with pytest.raises(SettingsError, match=r"^REDIS_URL is not set$"):
        load("redis_url")


def test_everything_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("REDIS_URL", "http://h")
    with pytest.raises(SettingsError) as refused:
        load()
    assert [part.partition(" ")[0].rstrip(":") for part in str(refused.value).split("; ")] == [
        "PORT",
        "REDIS_URL",
    ]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load().port = 1  # type: ignore[misc] # that is the point


def test_settings_do_not_show_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (
        ("CLERK_WEBHOOK_SIGNING_SECRET", SECRET),
        ("DATABASE_URL", "postgresql://u:hunter2@h/d"),
        ("REDIS_URL", "redis://:hunter2@h"),
        ("CLERK_SECRET_KEY", "sk_test_hunter2"),
        ("CONSOLE_PASSWORD", "hunter2"),
    ):
        monkeypatch.setenv(variable, value)
    shown = f"{load()!r} {load()}"
    assert "hunter2" not in shown
    assert SECRET.removeprefix("whsec_") not in shown


def test_an_override_replaces_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8001")
    assert load(port=8002).port == 8002
    assert load().port == 8001


def test_a_file_is_read_in_development_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("PORT=8001\nBATCH_SIZE=7\nSOMETHING_ELSE=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Settings.model_config, "env_file", ".env")
    monkeypatch.setenv("PORT", "8002")
    assert (load().port, load().batch_size) == (8002, 7)


def test_names_are_read_in_either_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("batch_size", "9")
    assert config.load().batch_size == 9


def test_an_env_file_that_is_no_utf_8_is_a_settings_error(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes("CONSOLE_PASSWORD=gl\u00fcck\n".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"^\.env is not written in UTF-8$"):
        config.load(_env_file=file)


def test_an_env_file_that_may_not_be_read_is_a_settings_error(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=8001\n")
    file.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read every file
        os.seteuid(65534)
    try:
        with pytest.raises(SettingsError, match=r"^\.env in the working directory may not be read: "):
            config.load(_env_file=file)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", " postgresql://h/d\n"),
        ("PORT", " 8001\r\n"),
        ("LOG_LEVEL", "INFO\n"),
        ("USER_DELETION", "\tanonymize "),
        ("CLERK_INSTANCE_ID", "ins_1\n"),
        ("CONSOLE_PASSWORD", "secret\n"),
        ("RECONCILE_EVERY", ""),
        ("CLERK_SECRET_KEY", " \n"),
    ],
)
def test_white_space_around_a_value_is_stripped(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    stripped = load()
    monkeypatch.setenv(variable, value.strip())
    assert stripped == load()


def test_a_url_of_several_hosts_is_taken() -> None:
    url = "postgresql://u:p@h1:5432,[::1]:5433,h3/d?target_session_attrs=read-write"
    assert load(database_url=url).database_url == SecretStr(url)
