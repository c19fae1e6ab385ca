"""DATABASE_URL in every form, and what is wrong with it."""

from urllib.parse import urlsplit

import pytest

import config
from config import SettingsError
from db.connection.engine import Database
from db.connection.url import postgres_url


@pytest.mark.parametrize(
    "url",
    [
        "postgres://ann:pw@db.example.com/app",
        "postgresql://ann:pw@db.example.com/app",
        "postgresql://ann:pw@ep-cool-name-123456-pooler.eu-central-1.aws.neon.tech/app"
        "?sslmode=require&channel_binding=require",
    ],
)
def test_every_form_of_url_that_providers_give_is_taken(url: str) -> None:
    parsed = postgres_url(config.load(_env_file=None, database_url=url))
    assert (parsed["user"], parsed["password"], parsed["host"]) == ("ann", "pw", urlsplit(url).hostname)
    assert (parsed.get("sslmode") == "require") is ("sslmode" in url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://h/d?port=hunter2", "has a port that is not a number from 1 to 65535"),
        ("postgresql://h:99999/d", "has a port that is not a number from 1 to 65535"),
        ("postgresql://u:hunter2%zz@h/d", "is not percent-encoded: write % as %25, also in the password"),
        ("postgresql://u:hunter2@h/d?sslmode", "has an option (after the ?) without a value"),
        (
            "postgresql://h/d?channel_binding=hunter2",
            "has a value of channel_binding that libpq does not know",
        ),
        ("postgresql://u:hunter2@h/d?pgbouncer=true", "has an option that libpq does not know: remove it"),
        ("postgresql://u:hunter2@h/d?sslmode=hunter2", "has a value of sslmode that libpq does not know"),
    ],
)
@pytest.mark.parametrize("field", ["database_url", "database_url_unpooled"])
def test_a_url_that_cannot_work_is_an_error_that_names_its_variable(url: str, why: str, field: str) -> None:
    settings = config.load(_env_file=None, **{field: url})
    with pytest.raises(SettingsError) as refused:
        Database(settings, unpooled=field.endswith("unpooled"))
    assert str(refused.value) == f"{field.upper()} {why}"


def test_the_unpooled_url_falls_back_to_the_other() -> None:
    pooled, unpooled = "postgresql://pooled/app", "postgresql://unpooled/app"
    both = config.load(_env_file=None, database_url=pooled, database_url_unpooled=unpooled)
    one = config.load(_env_file=None, database_url=pooled)
    assert [postgres_url(both, unpooled=flag)["host"] for flag in (False, True)] == ["pooled", "unpooled"]
    assert [postgres_url(one, unpooled=flag)["host"] for flag in (False, True)] == ["pooled", "pooled"]


def test_a_database_without_a_url_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL is not set$"):
        Database(config.load(_env_file=None))
