"""Where the database is: the URLs of the settings, checked without connecting."""

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from config import Settings, SettingsError

# libpq looks at it only when it connects. https://www.postgresql.org/docs/current/libpq-ssl.html
SSL_MODES = {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}


def variable(settings: Settings, *, unpooled: bool = False) -> str:
    """Return the name of the variable that the URL comes from; the unpooled one falls back to the other."""
    return "DATABASE_URL_UNPOOLED" if unpooled and settings.database_url_unpooled else "DATABASE_URL"


def postgres_url(settings: Settings, *, unpooled: bool = False) -> URL:
    """Return the URL to connect to.

    Raises SettingsError when it is not set, cannot be read, or has an option that libpq does not know.
    """
    name = variable(settings, unpooled=unpooled)
    secret = getattr(settings, name.lower())
    if secret is None:
        raise SettingsError(f"{name} is not set")
    try:
        url = make_url(secret.get_secret_value()).set(drivername="postgresql+psycopg")
        options = _options(url)
        make_conninfo(**options)
    except (ArgumentError, ValueError, TypeError):
        raise SettingsError(f"{name} is no URL that can be read") from None
    except psycopg.ProgrammingError:
        raise SettingsError(f"{name} has an option that libpq does not know: remove it") from None
    if options.get("sslmode", "disable") not in SSL_MODES:
        raise SettingsError(f"{name} has an sslmode that libpq does not know")
    return url


def hosts(settings: Settings, *, unpooled: bool = False) -> set[str]:
    """Return every host and address that the URL leads to; none, or a directory, is a socket on this machine.

    They may stand in the URL's query too, and what it leaves open libpq takes from PGHOST and the like
    (https://www.postgresql.org/docs/current/libpq-envars.html). A service's name counts as a host: where it
    leads, only libpq knows.
    """
    given = _options(postgres_url(settings, unpooled=unpooled))
    default = {option.keyword.decode(): (option.val or b"").decode() for option in Conninfo.get_defaults()}
    named = [str(given.get(word) or default[word]) for word in ("host", "hostaddr", "service")]
    return {host for part in named for host in part.split(",") if host}


def _options(url: URL) -> dict[str, str]:
    _, options = PGDialect_psycopg().create_connect_args(url)
    return {name: value for name, value in options.items() if name != "context"}
