"""The apply, change by change. That any history ends the same is shown in test_histories."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from typing import Any

import psycopg
import pytest
import structlog.testing
from psycopg.rows import dict_row
from pydantic import SecretStr

from db.apply import users
from db.connection.engine import Database
from db.connection.errors import ChangeRefused, DatabaseUnavailable
from db.merge.change import EmailClaim, Organization, Profile, UserChange, Version, placeholder_address
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy
from db.times import to_datetime
from tests.support.payloads import ANN, BEN, CAT, NOW
from tests.support.settings import MakeSettings
from tests.support.waiting import wait_until

SOON_S = 20
SHARED, OTHER = "shared@example.com", "other@example.com"
OURS = Policy()
ANONYMOUS = Policy(anonymize=True)

_numbers = count(1)
Row = dict[str, Any]
Connection = psycopg.Connection[Row]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """The application's connection."""
    with psycopg.connect(
        database_url, autocommit=True, row_factory=dict_row, prepare_threshold=None
    ) as connection:
        yield connection


def received(change: UserChange | Organization, svix_id: str | None = "new") -> ReceivedChange:
    """Return the change as a delivery brings it, with a svix-id of its own."""
    if svix_id == "new":
        svix_id = f"msg_{next(_numbers):06}"
    return ReceivedChange(change, svix_id, "user.updated", NOW, NOW + 1)


def saved(clerk_id: str, at: int, email: str | None = None, **fields: Any) -> ReceivedChange:
    """Return a whole profile, observed `at` ms after NOW."""
    version = Version(NOW + at, NOW + at)
    values = {"created_at": NOW, "name": f"name {at}", "organization": "Acme", "role": "user", **fields}
    return received(UserChange(clerk_id, Profile(version, **values), EmailClaim(version, email)))


def signed_in(clerk_id: str, at: int) -> ReceivedChange:
    return received(UserChange(clerk_id, login_at=NOW + at))


def deleted(clerk_id: str, at: int) -> ReceivedChange:
    return received(UserChange(clerk_id, deleted_at=NOW + at))


def apply(database: Database, *batch: ReceivedChange, policy: Policy = OURS) -> list[Outcome]:
    return users.apply(database, batch, policy)


def row(connection: Connection, clerk_id: str) -> Row:
    found = connection.execute("SELECT * FROM users WHERE clerk_id = %s", [clerk_id]).fetchone()
    assert found is not None
    return found


def sync_row(connection: Connection, clerk_id: str) -> Row:
    found = connection.execute("SELECT * FROM user_sync WHERE clerk_id = %s", [clerk_id]).fetchone()
    assert found is not None
    return found


def emails(connection: Connection) -> dict[str, str]:
    rows = connection.execute("SELECT clerk_id, email FROM users").fetchall()
    return {found["clerk_id"]: found["email"] for found in rows}


def test_changes_of_another_instance_change_nothing(database: Database, connection: Connection) -> None:
    """They may have been queued before CLERK_INSTANCE_ID was set."""
    own = Policy(instance_id="ins_own", follows_memberships=True)
    organization = Organization("org_a", Version(NOW, NOW), "Acme")
    foreign = [
        one._replace(instance_id="ins_other") for one in (saved(ANN, 1, SHARED), received(organization))
    ]
    mine = [saved(BEN, 1, SHARED)._replace(instance_id="ins_own"), saved("user_c", 1)]
    assert apply(database, *foreign, *mine, policy=own) == [*[Outcome.IGNORED] * 2, *[Outcome.APPLIED] * 2]
    assert emails(connection) == {BEN: SHARED, "user_c": placeholder_address("user_c")}
    assert connection.execute("SELECT id FROM instance_sync").fetchall() == [{"id": "ins_own"}]
    assert connection.execute("SELECT id FROM organization_sync").fetchall() == []


def existing(connection: Connection, clerk_id: str, email: str, **columns: Any) -> Row:
    """Insert a row as an application did before there was a sync."""
    values = {"clerk_id": clerk_id, "email": email, "name": "Before", **columns}
    names = psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, values))
    places = psycopg.sql.SQL(", ").join(map(psycopg.sql.Placeholder, values))
    insert = psycopg.sql.SQL("INSERT INTO users ({}) VALUES ({}) RETURNING *").format(names, places)
    found = connection.execute(insert, values).fetchone()
    assert found is not None
    return found


# Addresses


def test_fifty_pass_their_addresses_round_in_one_batch(database: Database, connection: Connection) -> None:
    apply(database, *(saved(f"user_{i}", 1, f"{i}@example.com") for i in range(50)))
    apply(database, *(saved(f"user_{i}", 2, f"{(i + 1) % 50}@example.com") for i in range(50)))
    assert emails(connection) == {f"user_{i}": f"{(i + 1) % 50}@example.com" for i in range(50)}


# Rows that the application removed, changed, or made before there was a sync


@pytest.mark.parametrize(("at", "email"), [(1, SHARED), (5, SHARED), (9, OTHER)])
def test_a_row_that_the_application_removed_comes_back_with_the_next_delivery(
    at: int, email: str, database: Database, connection: Connection
) -> None:
    """Its address is that of the newest claim, which has a version of its own."""
    apply(database, saved(ANN, 5, SHARED))
    connection.execute("DELETE FROM users")
    assert apply(database, saved(ANN, at, OTHER if at != 5 else SHARED)) == [Outcome.APPLIED]
    found = row(connection, ANN)
    assert (found["name"], found["email"]) == (f"name {at}", email)


def test_a_row_that_the_application_made_for_a_deleted_user_goes_with_the_next_delivery(
    database: Database, connection: Connection
) -> None:
    apply(database, deleted(ANN, 2))
    existing(connection, ANN, SHARED)
    apply(database, saved(ANN, 9, SHARED))
    assert emails(connection) == {}


def test_a_row_older_than_the_sync_is_adopted(database: Database, connection: Connection) -> None:
    before = existing(connection, ANN, OTHER, role="admin", organization="Old", last_login_at=moment(9))
    assert apply(database, saved(ANN, 1, SHARED, name="Ann")) == [Outcome.APPLIED]
    assert row(connection, ANN) == {
        "id": before["id"],
        "clerk_id": ANN,
        "email": SHARED,
        "name": "Ann",
        "organization": "Acme",
        "role": "user",
        "created_at": moment(0),
        "last_login_at": moment(9),
    }


def moment(at: int) -> datetime:
    return to_datetime(NOW + at)


def test_a_sign_in_changes_nothing_else_of_an_older_row(database: Database, connection: Connection) -> None:
    before = existing(connection, ANN, OTHER, role="admin", organization="Old", created_at=moment(-5))
    apply(database, signed_in(ANN, 7))
    assert row(connection, ANN) == {**before, "last_login_at": moment(7)}


def test_a_deletion_reaches_a_row_older_than_the_sync(database: Database, connection: Connection) -> None:
    existing(connection, ANN, OTHER)
    apply(database, deleted(ANN, 1))
    assert emails(connection) == {}


def test_any_claim_is_newer_than_that_of_an_older_row(database: Database, connection: Connection) -> None:
    existing(connection, ANN, SHARED)
    existing(connection, BEN, OTHER)
    apply(database, saved(BEN, -NOW + 1, SHARED))
    assert emails(connection) == {ANN: placeholder_address(ANN), BEN: SHARED}


def test_microseconds_are_adopted_as_milliseconds(database: Database, connection: Connection) -> None:
    login = datetime(2026, 1, 1, 10, 0, 0, 123456, tzinfo=UTC)
    existing(connection, ANN, OTHER, last_login_at=login)
    apply(database, saved(ANN, 1, OTHER), saved(ANN, 2, OTHER))
    found = row(connection, ANN)
    assert found["last_login_at"].replace(microsecond=0) == login.replace(microsecond=0)
    assert apply(database, saved(ANN, 2, OTHER, name="name 2")) == [Outcome.STALE]


# Deletion


def test_a_tombstone_keeps_no_personal_data(database: Database, connection: Connection) -> None:
    apply(database, saved(ANN, 1, SHARED), signed_in(ANN, 2))
    apply(database, deleted(ANN, 3))
    assert emails(connection) == {}
    assert sync_row(connection, ANN) == {
        **dict.fromkeys(sync_row(connection, ANN)),
        "clerk_id": ANN,
        "claim_verified": False,
        "deleted_at": moment(3),
    }


def test_anonymize_keeps_the_rows_id_and_nothing_personal(database: Database, connection: Connection) -> None:
    admin = saved(ANN, 1, SHARED, role="admin", name="Ann")
    apply(database, admin, signed_in(ANN, 2), policy=ANONYMOUS)
    before = row(connection, ANN)
    apply(database, deleted(ANN, 3), policy=ANONYMOUS)
    anonymous = {
        "id": before["id"],
        "clerk_id": ANN,
        "email": placeholder_address(ANN),
        "name": "Deleted user",
        "organization": None,
        "role": "user",
        "created_at": moment(0),
        "last_login_at": None,
    }
    assert row(connection, ANN) == anonymous
    kept = sync_row(connection, ANN)
    assert (kept["claimed_email"], kept["last_login_at"]) == (None, None)
    apply(database, saved(ANN, 9, SHARED), signed_in(ANN, 9), policy=ANONYMOUS)
    assert row(connection, ANN) == anonymous


def test_a_deletion_that_a_foreign_key_forbids_is_refused(database: Database, connection: Connection) -> None:
    apply(database, saved(ANN, 1, SHARED), saved(BEN, 1, OTHER))
    connection.execute("CREATE TABLE orders (user_id uuid CONSTRAINT orders_user REFERENCES users (id))")
    connection.execute("INSERT INTO orders SELECT id FROM users WHERE clerk_id = %s", [ANN])
    with pytest.raises(ChangeRefused, match=r"\(SQLSTATE 23503, constraint orders_user\)$"):
        apply(database, deleted(ANN, 2), saved(BEN, 2, OTHER))
    assert row(connection, ANN)["name"] == "name 1"
    assert row(connection, BEN)["name"] == "name 1", "of a refused batch nothing is written"


# The ledger


def ledger(connection: Connection) -> list[Row]:
    return connection.execute("SELECT * FROM webhook_events ORDER BY svix_id").fetchall()


def test_a_delivery_leaves_one_row_in_the_ledger(database: Database, connection: Connection) -> None:
    change = UserChange(ANN, login_at=NOW)
    apply(database, ReceivedChange(change, "msg_1", "session.created", NOW + 3, NOW + 4))
    (found,) = ledger(connection)
    assert abs(found.pop("applied_at") - datetime.now(UTC)).total_seconds() < 60
    assert found == {
        "svix_id": "msg_1",
        "type": "session.created",
        "clerk_id": ANN,
        "event_at": moment(3),
        "received_at": moment(4),
        "outcome": "applied",
    }


def test_a_svix_id_has_one_row_however_often_it_comes(database: Database, connection: Connection) -> None:
    twice = saved(ANN, 1, SHARED)
    assert apply(database, twice, twice) == [Outcome.APPLIED, Outcome.STALE]
    first = ledger(connection)
    assert apply(database, twice, saved(ANN, 2, SHARED)) == [Outcome.STALE, Outcome.APPLIED]
    assert ledger(connection)[:1] == first
    assert len(ledger(connection)) == 2


def test_a_change_that_no_delivery_carried_leaves_none(database: Database, connection: Connection) -> None:
    assert apply(database, received(UserChange(ANN, login_at=NOW), None)) == [Outcome.APPLIED]
    assert ledger(connection) == []
    assert sync_row(connection, ANN)["last_login_at"] == moment(0)


def test_the_outcome_says_what_a_delivery_did(database: Database, connection: Connection) -> None:
    outcomes = apply(
        database,
        saved(ANN, 5, SHARED),
        saved(ANN, 1, SHARED),
        received(UserChange(ANN)),
        signed_in(ANN, 1),
        deleted(ANN, 9),
        saved(ANN, 99, OTHER),
    )
    assert outcomes == ["applied", "stale", "ignored", "applied", "applied", "stale"]
    assert Counter(found["outcome"] for found in ledger(connection)) == Counter(outcomes)


def test_effect_and_ledger_are_one_transaction(database: Database, connection: Connection) -> None:
    connection.execute("ALTER TABLE webhook_events RENAME TO gone")
    with pytest.raises(DatabaseUnavailable, match="42P01"):
        apply(database, saved(ANN, 1, SHARED))
    assert emails(connection) == {}
    connection.execute("ALTER TABLE gone RENAME TO webhook_events")
    connection.execute("ALTER TABLE users ADD CONSTRAINT no_name CHECK (name <> 'Refused')")
    with pytest.raises(ChangeRefused, match="no_name"):
        apply(database, saved(ANN, 1, SHARED), saved(BEN, 1, OTHER, name="Refused"))
    assert (emails(connection), ledger(connection)) == ({}, [])


def test_nothing_to_apply_needs_no_database(make_settings: MakeSettings) -> None:
    nowhere = SecretStr("postgresql://127.0.0.1:1/x")
    settings = make_settings(database_url=nowhere, database_url_unpooled=None, redis_url=None)
    assert users.apply(Database(settings), [], OURS) == []


# What it costs


def sign_ups(size: int) -> Sequence[ReceivedChange]:
    return [saved(f"user_{size}_{i}", 1, f"{size}.{i}@example.com") for i in range(size)]


def moves(size: int) -> Sequence[ReceivedChange]:
    """Every user takes the address of a user who is not in the batch."""
    return [saved(f"user_{size}_{i}", 3, f"rival.{size}.{i}@example.com") for i in range(size)]


def rivals(size: int) -> Sequence[ReceivedChange]:
    return [saved(f"rival_{size}_{i}", 2, f"rival.{size}.{i}@example.com") for i in range(size)]


def departures(size: int) -> Sequence[ReceivedChange]:
    return [deleted(f"user_{size}_{i}", 9) for i in range(size)]


def sign_ins(size: int) -> Sequence[ReceivedChange]:
    return [received(UserChange(f"user_{size}_{i}", login_at=NOW + 5)) for i in range(size)]


def test_a_batch_reads_no_table_from_end_to_end(database: Database, connection: Connection) -> None:
    """At this size the planner would read all of `users` to find the holders of 100 addresses."""
    connection.execute(
        "INSERT INTO users (clerk_id, email, name)"
        " SELECT 'user_' || n, 'user_' || n || '@example.com', 'Name' FROM generate_series(1, 20000) n"
    )
    connection.execute("ANALYZE users")
    before = scans(connection)
    apply(database, *(saved(f"user_{i}", 1, f"user_{i}@example.com") for i in range(100)))
    database.dispose()  # a session that ends reports what it has counted
    wait_until(lambda: scans(connection)["tuples"] >= 20_100, SOON_S)
    assert scans(connection)["whole"] == before["whole"]


def scans(connection: Connection) -> Row:
    """Return how often `users` was read from end to end, and how many rows were written to it."""
    found = connection.execute(
        "SELECT seq_scan AS whole, n_tup_ins + n_tup_upd AS tuples FROM pg_stat_user_tables"
        " WHERE relname = 'users'"
    ).fetchone()
    assert found is not None
    return found


# Many at once


def test_many_who_claim_one_address_never_deadlock(database: Database, connection: Connection) -> None:
    def claims(number: int) -> list[ReceivedChange]:
        return [saved(f"user_{number % 9}_{i}", number, SHARED) for i in range(4)]

    with structlog.testing.capture_logs() as logs, ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda number: apply(database, *claims(number)), range(60)))
    assert logs == [], "no attempt failed, so nothing was retried"
    assert [one for one, email in emails(connection).items() if email == SHARED] == ["user_5_3"]


def test_workers_with_nothing_in_common_do_not_wait(database: Database, database_url: str) -> None:
    apply(database, saved(ANN, 1, SHARED), saved(BEN, 1, OTHER))
    with psycopg.connect(database_url, prepare_threshold=None) as other:
        other.execute("SELECT 1 FROM user_sync WHERE clerk_id = %s FOR UPDATE", [ANN])
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(apply, database, saved(BEN, 2, OTHER)).result(20) == [Outcome.APPLIED]
            assert thread.submit(apply, database, saved(CAT, 2, "c@example.com")).result(20) == ["applied"]
