"""`web` and `worker`: what the Procfile starts."""

import click
import structlog

from config import load
from db.connection.url import postgres_url
from worker import log

SENSITIVE_FIELDS = frozenset({"private_metadata", "unsafe_metadata"})


@click.command()
def web() -> None:
    """Run the receiver: verify deliveries on PORT and queue them."""
    settings = load("clerk_webhook_signing_secret", "redis_url", "database_url")
    log.configure(settings)
    from web.allocators import bound_thread_memory  # noqa: PLC0415 - a worker has few threads

    bound_thread_memory()  # before granian is imported
    from web.server import serve  # noqa: PLC0415 - a worker does not need the server
    from worker.redis_client import redis_url  # noqa: PLC0415 - nor does --help need Redis

    for check in (redis_url, postgres_url):  # a wrong value ends the command before it starts processes
        check(settings)
    serve(settings)


@click.command()
def worker() -> None:
    """Run a worker: apply queued deliveries to the tables.

    A worker is one process. Start as many as needed.
    """
    settings = load("redis_url", "database_url")
    log.configure(settings)
    sensitive = SENSITIVE_FIELDS.intersection(settings.profile_fields)
    if sensitive:
        structlog.get_logger("cli").warning(
            "PROFILE_FIELDS stores metadata that may be private, or that users can write",
            fields=sorted(sensitive),
        )
    from worker.runner.batch_worker import run  # noqa: PLC0415 - the receiver does not need RQ

    run(settings)
