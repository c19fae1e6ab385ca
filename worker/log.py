"""Logging: the lines of this service, of RQ and of the HTTP server, all in one format."""

import json
import logging
import sys
import traceback
from contextlib import suppress

import orjson
import structlog
from structlog.typing import EventDict, Processor

from config import Settings

_JSON = json.JSONEncoder(default=repr)
CHATTY = ("rq.worker", "rq.scheduler", "alembic")
REVEALING = {"psycopg": logging.ERROR, "httpx": logging.WARNING, "httpcore": logging.WARNING}


def configure(settings: Settings) -> None:
    """Send every line, structlog's and the standard library's, to stdout as LOG_FORMAT and LOG_LEVEL say."""
    fields: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_terminal = sys.stdout.isatty()
    is_json = settings.log_format == "json" or (settings.log_format is None and not is_terminal)
    render: list[Processor] = (
        [_render_json] if is_json else [_escaped, structlog.dev.ConsoleRenderer(colors=is_terminal)]
    )
    text = [_without_traceback, *render]
    structlog.configure(
        processors=[*fields, *text],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=_Lines,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*fields, structlog.stdlib.PositionalArgumentsFormatter()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *text],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name, level in REVEALING.items():  # hosts, databases, users, URLs
        logging.getLogger(name).setLevel(max(level, root.level))
    pool = "db.connection.pool"  # SQLAlchemy's, by the name of its class
    logging.getLogger(pool).setLevel(logging.CRITICAL)
    if settings.log_level != "DEBUG":
        for name in CHATTY:
            logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class _Lines:
    """Writes this service's lines. The standard library's logging costs a delivery a tenth more CPU time.

    As there, a line that cannot be written (full disk, closed pipe) is dropped.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._file = sys.stdout

    def info(self, line: str) -> None:
        with suppress(OSError, ValueError):
            self._file.write(f"{line}\n")
            self._file.flush()

    debug = warning = error = info


def silence() -> None:
    """Drop every line: a command reports errors in its own output."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.ReturnLoggerFactory(),
    )
    logging.getLogger().handlers = [logging.NullHandler()]


def fault(error: BaseException) -> str:
    """Return an error's class and where it was raised, without its text, which may quote personal data."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.name}, line {place.lineno}"


def _without_traceback(_logger: object, _name: str, event: EventDict) -> EventDict:
    # The text of an exception may quote personal data; its class does not.
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    if isinstance(exc_info, BaseException):
        event["error"] = type(exc_info).__name__
    elif isinstance(exc_info, tuple) and exc_info[0] is not None:
        event["error"] = exc_info[0].__name__
    return event


def _escaped(_logger: object, _name: str, event: EventDict) -> EventDict:
    # Ids from Redis may be any text: they must not steer the terminal, nor begin another line.
    return {
        key: repr(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value
        for key, value in event.items()
    }


def _render_json(_logger: object, _name: str, event: EventDict) -> str:
    try:
        return orjson.dumps(event, default=repr).decode()
    except TypeError:  # orjson refuses lone surrogates, very large numbers, and keys that are no text
        return _JSON.encode(event)
