import base64
import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

import config
from config import Settings, SettingsError, load
from tests.support.settings import SECRET


def key(size: int = 24) -> bytes:
    return bytes(range(7, 7 + size))


def secret(raw: bytes) -> str:
    return f"whsec_{base64.b64encode(raw).decode()}"


# Each variable with values that it takes, and with some that it does not.
GOOD: dict[str, tuple[str, ...]] = {
    "PORT": ("0", "65535"),
    "WEB_WORKERS": ("1",),
    "MAX_BODY_BYTES": ("2048",),
    "HOST": ("::1",),
    "DB_POOL_SIZE": ("200",),
    "DB_MAX_OVERFLOW": ("0",),
    "DB_POOL_TIMEOUT": ("0.5",),
    "BATCH_SIZE": ("1", "500"),
    "SHUTDOWN_SECONDS": ("5.5",),
    "USER_DELETION": ("anonymize",),
    "ROLE_SOURCE": ("none",),
    "ROLE_METADATA_KEY": ("level",),
    "ORGANIZATION_SOURCE": ("none",),
    "ORGANIZATION_METADATA_KEY": ("company", "https://app.example/the company"),
    "EVENT_RETENTION_DAYS": ("1",),
    "SILENCE_ALARM_MINUTES": ("30.5",),
    "LOG_LEVEL": ("DEBUG",),
    "LOG_FORMAT": ("json",),
    "CLERK_INSTANCE_ID": ("ins_1",),
    "CLERK_API_URL": ("http://127.0.0.1:9",),
    "CLERK_SECRET_KEY": ("sk_test_1",),
    "CONSOLE_PASSWORD": ("open sesame",),
    "DATABASE_URL": (
        "postgres://u:p@h:5432/d?sslmode=require",
        "postgresql://h/d",
        "postgresql://u:p?w@h/d",
        "postgresql://u:p@h1:5432,[::1]:5433,h3/d?target_session_attrs=read-write",
    ),
    "DATABASE_URL_UNPOOLED": ("postgres://h/d",),
    "REDIS_URL": ("redis://:p@h:6379/0", "rediss://h", "redis://h/15/?protocol=2", "unix:///run/redis.sock"),
}
BAD: dict[str, tuple[str, ...]] = {
    "PORT": ("-1", "65536", "http"),
    "WEB_WORKERS": ("0", "two"),
    "MAX_BODY_BYTES": ("10", "1MiB"),
    "HOST": ("example.com", "127.0.0.1:80"),
    "DB_POOL_SIZE": ("0", "1.5"),
    "DB_MAX_OVERFLOW": ("-1",),
    "DB_POOL_TIMEOUT": ("0", "nan", "inf"),
    "BATCH_SIZE": ("0", "501"),
    "SHUTDOWN_SECONDS": ("-1",),
    "USER_DELETION": ("forget", "DELETE FROM users"),
    "ROLE_SOURCE": ("unsafe_metadata",),
    "ROLE_METADATA_KEY": ('"role"',),
    "ORGANIZATION_SOURCE": ("email",),
    "ORGANIZATION_METADATA_KEY": ("'company'",),
    "EVENT_RETENTION_DAYS": ("0", "a month", "1000000"),
    "SILENCE_ALARM_MINUTES": ("0",),
    "RECONCILE_EVERY": ("hunter2",),
    "LOG_LEVEL": ("VERBOSE",),
    "LOG_FORMAT": ("xml",),
    "CLERK_API_URL": ("api.clerk.example", "https://hunter2..example"),
    "CLERK_INSTANCE_ID": ('"ins_2abc"', "ins_2abc,ins_2def"),
    "CLERK_SECRET_KEY": ("sk_test hunter2", "hunter2\nx"),
    "PULL_TOKEN": ("hunter2 é",),
    "DATABASE_URL": (
        "mysql://hunter2@h/d",
        "hunter2",
        "replace_me",
        "postgresql://u:hunter2@h:port/d",
        "postgresql://u:hunter2@h:hunter2/d",
        "postgresql://u:hunter2@[h/d",
        "postgresql://u:p@hunter2@h:5432/d",
        "postgresql://u:p@hunter2:w@h/d",
    ),
    "DATABASE_URL_UNPOOLED": ("http://hunter2@h/d", "hunter2"),
    "REDIS_URL": (
        "http://hunter2@h",
        "h:6379",
        "redis://:hunter2@h:port",
        "hunter2://:hunter2@h",
        "redis://:hunter2@h..example",
        f"redis://:hunter2@{'h' * 64}",
        "redis://:hunter2@h/clerk",  # redis-py would use database 0
        "redis://:hunter2@h/1/2",  # and here 12
    ),
}
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


def each(values: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(variable, value) for variable, some in values.items() for value in some]


@pytest.mark.parametrize(("variable", "value"), each(GOOD))
def test_a_good_value_is_read(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    read = getattr(load(), variable.lower())
    assert (read.get_secret_value() if isinstance(read, SecretStr) else str(read)) == value


@pytest.mark.parametrize(("host", "address"), [("[::]", "::"), ("localhost", "127.0.0.1")])
def test_a_host_is_read_as_its_address(host: str, address: str) -> None:
    assert load(host=host).host == address


@pytest.mark.parametrize(("variable", "value"), each(BAD))
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
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@pytest.mark.parametrize("value", BAD_SECRETS.values(), ids=BAD_SECRETS.keys())
def test_a_bad_signing_secret_is_refused_and_not_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", value)
    with pytest.raises(SettingsError, match=r"^CLERK_WEBHOOK_SIGNING_SECRET[ :]") as refused:
        load()
    assert value.removeprefix("whsec_") == "" or value.removeprefix("whsec_") not in str(refused.value)


@pytest.mark.parametrize("separator", [",", " ", ", ", "\n", " ,  "])
def test_several_signing_secrets_keep_their_order(separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (settings.port, settings.batch_size, settings.event_retention_days) == (8000, 500, 30)
    assert (settings.user_deletion, settings.role_source, settings.log_format) == ("delete", "metadata", None)


def test_an_empty_value_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "")
    monkeypatch.setenv("BATCH_SIZE", "")
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/d")
    assert load().batch_size == 500
    with pytest.raises(SettingsError, match=r"^REDIS_URL is not set$"):
        load("redis_url", "database_url")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load().port = 1  # type: ignore[misc] # that is the point


def test_an_override_replaces_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8001")
    assert load(port=8002).port == 8002
    assert load().port == 8001


def test_the_environment_goes_before_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_white_space_is_stripped(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    stripped = load()
    monkeypatch.setenv(variable, value.strip())
    assert stripped == load()
