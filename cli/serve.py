"""`web` and `worker`: what the Procfile starts."""

import os
import sys

import click

from config import load
from db.connection.url import postgres_url
from worker import log
from worker.shutdown import StopSignal
from worker.supervisor import supervise


@click.command()
def web() -> None:
    """Receive deliveries on PORT."""
    settings = load("clerk_webhook_signing_secret", "redis_url", "database_url")
    log.configure(settings)
    from web.server import serve  # noqa: PLC0415 - a worker need not load the server
    from worker.redis_client import redis_url  # noqa: PLC0415 - nor the parent of several workers

    for check in (redis_url, postgres_url):  # one that is wrong is to end the command, not its processes
        check(settings)
    serve(settings)


@click.command()
@click.option(
    "--processes", default=1, show_default=True, type=click.IntRange(1, 64), help="How many to run."
)
@click.option("--parent", type=int, hidden=True, help="Stop when this process is no longer the parent.")
def worker(processes: int, parent: int | None) -> None:
    """Apply what is on the queue."""
    settings = load("redis_url", "database_url")
    log.configure(settings)
    if processes > 1:
        postgres_url(settings)  # see above
        _supervise(processes)
    else:
        from worker.runner.batch_worker import run  # noqa: PLC0415 - the receiver need not load RQ

        run(settings, parent)


def _supervise(processes: int) -> None:
    stopping = StopSignal()
    stopping.listen()
    command = [sys.executable, "-m", "cli.main", "worker", "--parent", str(os.getpid())]
    supervise(command, processes, stopping)
