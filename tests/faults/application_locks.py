"""Locks, triggers and policies of the application, and the time that sixty deliveries take beside them."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import psycopg

from tests.faults.service import Service
from tests.support.payloads import NOW, user, user_event
from tests.support.queue import delivery
from tests.support.waiting import wait_until
from worker.queue.producer import DeliveryQueue

USERS = 60
SOON_S = 30.0
ONE = "clerk_id = 'user_7'"
TRIGGER = """
    CREATE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.clerk_id = 'user_7' THEN {action}; END IF; RETURN NEW;
    END $$;
    CREATE TRIGGER interfere BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION interfere()
"""
NO_TRIGGER = "DROP TRIGGER interfere ON users; DROP FUNCTION interfere"

Connection = psycopg.Connection[Any]
Trouble = Callable[[Connection], Any]


class SeenBesideLocks(NamedTuple):
    """The time until the others were applied, and from the end of the trouble until the rest was, in s."""

    trouble: str
    others: int
    others_s: float
    rest: int
    rest_s: float

    def __str__(self) -> str:
        rest = f"{self.rest_s:.1f} s" if self.rest else "-"
        others = f"{self.others_s:.1f} s" if self.others else "-"
        return f"| {self.trouble} | {self.others} | {others} | {self.rest} | {rest} |"


@contextmanager
def _open(statement: str, connection: Connection) -> Iterator[None]:
    with connection.transaction(force_rollback=True):
        connection.execute(statement.encode())
        yield


@contextmanager
def _changed(statement: str, undo: str, connection: Connection) -> Iterator[None]:
    connection.execute(statement.encode())
    yield
    connection.execute(undo.encode())


def _trigger(action: str) -> Trouble:
    return partial(_changed, TRIGGER.format(action=action), NO_TRIGGER)


# Each with the number of deliveries that it delays
TROUBLES: dict[str, tuple[int, Trouble]] = {
    "nothing": (0, partial(_open, "SELECT 1")),
    "open foreign keys to all users": (
        0,
        partial(_open, "INSERT INTO children (user_id) SELECT id FROM users ORDER BY clerk_id DESC"),
    ),
    "`SELECT … FOR UPDATE` on a user": (1, partial(_open, f"SELECT FROM users WHERE {ONE} FOR UPDATE")),
    "`UPDATE` of six users": (6, partial(_open, "UPDATE users SET name = '' WHERE clerk_id LIKE 'user%5'")),
    "a trigger that raises for a user": (1, _trigger("RAISE 'no'")),
    "a trigger that lacks its table, for a user": (1, _trigger("PERFORM FROM audit_log_that_was_dropped")),
    "`LOCK TABLE users IN SHARE MODE`": (USERS, partial(_open, "LOCK TABLE users IN SHARE MODE")),
    "row-level security without a policy": (
        USERS,
        partial(
            _changed,
            "ALTER TABLE users ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            "ALTER TABLE users DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY",
        ),
    ),
}


def beside(service: Service, connection: Connection, trouble: str, at: int) -> SeenBesideLocks:
    """Queue an update of each user during the trouble; end it, and wait for the rest."""
    kept, begin = TROUBLES[trouble]
    with begin(connection):
        began = time.monotonic()
        fill(service, at)
        applied = partial(_applied, service, at)
        wait_until(lambda: applied() >= USERS - kept, 2 * SOON_S, service.logs)
        others_s = time.monotonic() - began
        if kept == USERS:
            time.sleep(SOON_S / 3)
        assert applied() == USERS - kept
    ended = time.monotonic()
    wait_until(lambda: applied() == USERS, 2 * SOON_S, service.logs)
    return SeenBesideLocks(trouble, USERS - kept, others_s, kept, time.monotonic() - ended)


def fill(service: Service, at: int) -> None:
    """Queue a delivery of each user's version of that time (ms after NOW)."""
    with closing(DeliveryQueue(service.redis)) as queue:
        for i in range(USERS):
            data = user(f"user_{i}", first_name=f"version {at}", last_name=None, updated_at=NOW + at)
            queue.enqueue(delivery(user_event("user.updated", data, timestamp=NOW + at)))


def _applied(service: Service, at: int) -> int:
    database_url = service.settings.database_url
    assert database_url
    with psycopg.connect(database_url.get_secret_value()) as connection:
        query = "SELECT count(*) FROM users WHERE name = %s"
        return int(connection.execute(query, [f"version {at}"]).fetchall()[0][0])


def run(service: Service, connection: Connection) -> str:
    """Try every trouble; return the rows of a table. Fail unless all deliveries were applied soon."""
    connection.execute("CREATE TABLE children (id serial PRIMARY KEY, user_id uuid REFERENCES users)")
    fill(service, 0)
    wait_until(lambda: _applied(service, 0) == USERS, 2 * SOON_S, service.logs)
    seen = [beside(service, connection, trouble, at) for at, trouble in enumerate(TROUBLES, 1)]
    for each in seen:
        assert max(each.others_s, each.rest_s) < SOON_S, each
    return "\n".join(map(str, seen))
