"""The database URLs in the settings, read by libpq's own parser."""

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from config import Settings, SettingsError

# libpq checks these only when it connects. https://www.postgresql.org/docs/current/libpq-connect.html
VALUES = {
    "sslmode": {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"},
    "channel_binding": {"disable", "prefer", "require"},
    "target_session_attrs": {"any", "read-write", "read-only", "primary", "standby", "prefer-standby"},
}
# libpq's messages about a malformed URL, which quote parts of it, and the messages that replace them.
PARTS = {
    "invalid URI query parameter": "has an option that libpq does not know: remove it",
    "separator": "has an option (after the ?) without a value",
    "percent-encoded": "is not percent-encoded: write % as %25, also in the password",
    "IPv6": "has an IPv6 address that is not closed with ]",
    "host": "has a host or port that cannot be read",
    "": "cannot be read as a URL",
}


def variable(settings: Settings, *, unpooled: bool = False) -> str:
    """Return the name of the variable that the URL comes from; the unpooled one falls back to the other."""
    return "DATABASE_URL_UNPOOLED" if unpooled and settings.database_url_unpooled else "DATABASE_URL"


def postgres_url(settings: Settings, *, unpooled: bool = False) -> dict[str, str]:
    """Return the parameters to connect with, as libpq reads them from the URL: hosts may be several.

    Raises SettingsError, which says which part of the URL is wrong.
    """
    name = variable(settings, unpooled=unpooled)
    secret = getattr(settings, name.lower())
    if secret is None:
        raise SettingsError(f"{name} is not set")
    try:
        given = conninfo_to_dict(secret.get_secret_value())
    except psycopg.ProgrammingError as error:
        wrong = next(words for part, words in PARTS.items() if part in str(error))
        raise SettingsError(f"{name} {wrong}") from None
    parameters = {key: str(value) for key, value in given.items()}
    if not all(_is_port(port) for port in parameters.get("port", "").split(",")):
        raise SettingsError(f"{name} has a port that is not a number from 1 to 65535")
    for option, known in VALUES.items():
        if parameters.get(option, next(iter(known))) not in known:
            raise SettingsError(f"{name} has a value of {option} that libpq does not know")
    return parameters


def _is_port(text: str) -> bool:
    return text == "" or (text.isascii() and text.isdigit() and 0 < int(text) < 65536)


def hosts(settings: Settings, *, unpooled: bool = False) -> set[str]:
    """Return every host and address in the URL. An empty one, or a directory, means a socket on this machine.

    They may be in the URL's query too. If the URL names none, libpq uses PGHOST and similar variables
    (https://www.postgresql.org/docs/current/libpq-envars.html). A service's name counts as a host, because
    only libpq can resolve it.
    """
    given = postgres_url(settings, unpooled=unpooled)
    default = {option.keyword.decode(): (option.val or b"").decode() for option in Conninfo.get_defaults()}
    named = [str(given.get(word) or default[word]) for word in ("host", "hostaddr", "service")]
    return {host for part in named for host in part.split(",") if host}
