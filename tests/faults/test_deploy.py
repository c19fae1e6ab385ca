"""Stopping and replacing processes under load."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random
from typing import cast

from redis import Redis

from db import schema
from tests.faults.chaos import await_settled, compare
from tests.faults.overload import slow_database
from tests.faults.random_histories import some_deliveries
from tests.faults.servers import Servers
from tests.faults.service import ROOT, Service
from tests.faults.svix import THREADS, Svix
from tests.support.processes import clerk_sync
from tests.support.queue import RqView
from tests.support.stack import environment
from tests.support.supervised_process import SupervisedProcess, has_begun, running, supervised_worker
from tests.support.waiting import wait_until
from worker.queue.rq_format import QUEUE_KEY, STARTED_KEY

PARTS = ("config.py", "cli", "db", "migrations", "web", "worker")
MIGRATION = '''"""A column and an index of the next version."""

from alembic import op
from sqlalchemy import Column, String

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("users", Column("nickname", String(255), nullable=True))
    op.create_index("idx_users_nickname", "users", ["nickname"])


def downgrade() -> None:
    op.drop_column("users", "nickname")
'''
LOAD_S = 8
STEP_S = 1.5
# The errors of a client that sends on an idle connection which the receiver has just closed
HANGING_UP = ("BrokenPipeError", "RemoteDisconnected", "ConnectionResetError")
SOON_S = 30


def next_version(directory: Path) -> dict[str, str]:
    """Create a next version with one more migration, and return the environment that runs it."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory)
    migration = directory / "migrations" / "versions" / "9999_next.py"
    migration.write_text(MIGRATION.format(head=schema.head()))
    return {"PYTHONPATH": str(directory)}


def test_a_new_version_with_a_migration_replaces_the_old_one_under_load_and_nothing_is_lost(
    servers: Servers, directory: Path
) -> None:
    deliveries = some_deliveries(401, 600)
    settings = servers.fresh()
    old_directory, new_directory = directory / "old", directory / "new"
    for path in (old_directory, new_directory):
        path.mkdir()
    env = next_version(new_directory)
    new = Service(settings, new_directory, env=env)
    with Service(settings, old_directory) as old, Svix(old.ports, Random(0)) as svix:
        svix.send(deliveries[::2], over_s=LOAD_S, twice=0.1)
        time.sleep(STEP_S)
        command = clerk_sync("db", "upgrade")
        env |= environment(settings)
        subprocess.run(command, env=env, cwd=new_directory, check=True, timeout=SOON_S)
        with new:
            svix.ports = [*old.ports, *new.ports]
            svix.send(deliveries[1::2], over_s=2 * STEP_S, twice=0.1)
            time.sleep(STEP_S)
            for process in old.processes:
                process.signal(signal.SIGTERM)
            svix.ports = new.ports
            wait_until(lambda: not any(m.running for m in old.processes), SOON_S, old.logs)
            assert [process.exit_status for process in old.processes] == [0, 0]
            await_settled(new, svix)
            workers = {RqView(new.redis).job(delivery.svix_id).worker_name for delivery in deliveries}
    assert_no_answer_but_success(svix)
    assert len(workers) == 2, "the workers of both versions applied deliveries"
    compare(settings, deliveries)
    with servers.connection() as connection:
        connection.execute("SELECT nickname FROM users")


def test_a_receiver_that_is_stopped_under_load_answers_what_it_has_and_queues_what_it_answered(
    servers: Servers, directory: Path
) -> None:
    deliveries = some_deliveries(402, 1000)
    settings = servers.fresh(web_workers=2)
    with Service(settings, directory, workers=0) as service, Svix(service.ports, Random(0)) as svix:
        (receiver,) = service.receivers
        svix.send(deliveries)
        wait_until(lambda: len(svix.accepted_at) > 200, SOON_S, service.logs)
        receiver.signal(signal.SIGTERM)
        wait_until(lambda: not receiver.running, SOON_S, service.logs)
        assert receiver.exit_status == 0
        queued = service.redis.lrange(QUEUE_KEY, 0, -1)
    assert_no_answer_but_success(svix)
    assert sorted(queued) == sorted(id_.encode() for id_ in svix.accepted_at)


def test_a_worker_that_is_stopped_in_the_middle_of_a_batch_finishes_it_in_time(
    servers: Servers, service: Service, directory: Path
) -> None:
    deliveries = some_deliveries(403, 100)
    stopped = supervised_worker("stopped", environment(service.settings), directory)
    with Svix(service.ports, Random(0)) as svix, running(stopped):
        wait_until(lambda: has_begun(stopped), SOON_S, stopped.text)
        with slow_database(servers):
            svix.send(deliveries)
            wait_until(lambda: is_at_work(service.redis, stopped), SOON_S, stopped.text)
            began = time.monotonic()
            stopped.signal(signal.SIGTERM)
            wait_until(lambda: not stopped.running, SOON_S, stopped.text)
        assert stopped.exit_status == 0
        assert time.monotonic() - began < service.settings.shutdown_seconds
        assert '"batch"' in stopped.text()
        await_settled(service, svix)
    compare(service.settings, deliveries)


def assert_no_answer_but_success(svix: Svix) -> None:
    """Fail if a stopping receiver has refused a delivery, or closed more than idle connections."""
    hung_up = sum(svix.answers.pop(name, 0) for name in HANGING_UP)
    assert set(svix.answers) <= {"200", "202", "ConnectionRefusedError"}, svix.answers
    assert hung_up <= THREADS


def is_at_work(redis: Redis, worker: SupervisedProcess) -> bool:
    """Return whether a worker has begun a batch; jobs that it only holds, it would release."""
    names = tuple(f":{rq.name}" for rq in RqView(redis).workers() if rq.pid == worker.pid)
    started = cast("list[bytes]", redis.zrange(STARTED_KEY, 0, -1))
    return any(execution.decode().endswith(names) for execution in started)
