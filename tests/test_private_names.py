"""What the product uses of libraries although they do not document it: a new version may take it away."""

import inspect
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from redis import BlockingConnectionPool
from redis.connection import AbstractConnection, Connection
from rq.worker import SimpleWorker
from sqlalchemy.pool import QueuePool

USED: dict[str, tuple[Callable[..., Any], str]] = {
    "db.connection.pool": (QueuePool._do_return_conn, "self, record"),
    "db.connection.driver": (psycopg.Connection.wait, "self, gen, interval, timeout"),
    "worker.redis_client, a connection of a pool": (BlockingConnectionPool.make_connection, "self"),
    "worker.redis_client, a question": (Connection.send_command, "self, args, kwargs"),
    "worker.queue.consumer, a wait": (Connection.can_read, "self, timeout"),
    "worker.runner.batch_worker, address": (SimpleWorker._set_ip_address, "self, connection"),
    "worker.runner.batch_worker, registration": (SimpleWorker.serialize, "self"),
    "worker.runner.batch_worker, commands": (
        SimpleWorker._pubsub_exception_handler,
        "self, exc, pubsub, pubsub_thread",
    ),
}


@pytest.mark.parametrize("user", USED)
def test_a_private_function_takes_what_it_took_when_it_was_read(user: str) -> None:
    function, parameters = USED[user]
    assert ", ".join(inspect.signature(function).parameters) == parameters


def test_a_connection_to_redis_says_whether_it_is_open_and_takes_a_packer() -> None:
    assert isinstance(inspect.getattr_static(Connection, "is_connected"), property)
    assert "command_packer" in inspect.signature(AbstractConnection.__init__).parameters
