"""`web` and `worker`: what the Procfile starts."""

import click
import structlog

from config import load
from db.connection.url import postgres_url
from worker import log

SENSITIVE_FIELDS = frozenset({"private_metadata", "unsafe_metadata"})


@click.command()
def web() -> None:
    """Receive deliveries on PORT."""
    settings = load("clerk_webhook_signing_secret", "redis_url", "database_url")
    log.configure(settings)
    from web.server import serve  # noqa: PLC0415 - a worker need not load the server
    from worker.redis_client import redis_url  # noqa: PLC0415 - nor Redis, when it only explains itself

    for check in (redis_url, postgres_url):  # one that is wrong is to end the command, not its processes
        check(settings)
    serve(settings)


@click.command()
def worker() -> None:
    """Apply what is on the queue."""
    settings = load("redis_url", "database_url")
    log.configure(settings)
    sensitive = SENSITIVE_FIELDS.intersection(settings.profile_fields)
    if sensitive:
        structlog.get_logger("cli").warning(
            "PROFILE_FIELDS stores metadata that may be private or written by the user itself",
            fields=sorted(sensitive),
        )
    from worker.runner.batch_worker import run  # noqa: PLC0415 - the receiver need not load RQ

    run(settings)
