"""Rows of `users` that others wrote, and what others added to the table."""

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from db import migration
from db.apply import users
from db.connection.driver import BoundedTimestamptzLoader
from db.connection.engine import RACE_ATTEMPTS, Database
from db.connection.errors import ChangeRefused
from db.drift import users as drift
from db.merge.change import placeholder_address
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from db.merge.rows import UserRow
from db.times import to_datetime
from tests.db.test_users import OTHER, SHARED, deleted, emails, existing, row, saved, signed_in
from tests.support.checkouts import count_checkouts
from tests.support.payloads import ANN, BEN, CAT, NOW

Connection = psycopg.Connection[dict[str, Any]]
ODD_IDS = {
    "another provider's": "google:42",
    "one that is too long for a placeholder": "u" * 255,
    "spaces and signs": 'a "b" <c>@d,e',
    "letters of any script": "ζωή münchen 😀",
    "empty": "",
}
ODD_TIMES = [
    "infinity",
    "-infinity",
    "4713-01-01 BC",
    "294276-12-31",
    "0001-01-01 00:00+14",
    "9999-12-31 23:59-14",
]


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(
        database_url, autocommit=True, row_factory=dict_row, prepare_threshold=None
    ) as connection:
        connection.adapters.register_loader("timestamptz", BoundedTimestamptzLoader)
        yield connection


def batches(database: Database, *story: Sequence[ReceivedChange]) -> None:
    for batch in story:
        users.apply(database, batch, Policy())


# A row without history keeps the claim on its address


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("has_signed_in", [False, True])
def test_an_address_that_was_taken_comes_back_to_a_row_without_history_whatever_the_batches(
    database: Database, connection: Connection, *, size: int, backwards: bool, has_signed_in: bool
) -> None:
    existing(connection, ANN, SHARED)
    if has_signed_in:
        batches(database, [signed_in(ANN, 1)])
    story = [saved(BEN, 1, SHARED), saved(CAT, 2, SHARED), saved(BEN, 3, OTHER), deleted(CAT, 4)]
    ordered = story[::-1] if backwards else story
    batches(database, *(ordered[at : at + size] for at in range(0, len(ordered), size)))
    assert emails(connection) == {ANN: SHARED, BEN: OTHER}


# Any Clerk id


@pytest.mark.parametrize("odd", ODD_IDS.values(), ids=ODD_IDS)
def test_a_row_with_any_other_id_gives_its_address_to_a_user_and_gets_it_back(
    odd: str, database: Database, connection: Connection
) -> None:
    existing(connection, odd, SHARED)
    batches(database, [saved(BEN, 1, SHARED)])
    assert emails(connection) == {odd: placeholder_address(odd), BEN: SHARED}
    batches(database, [saved(BEN, 2, OTHER)])
    assert emails(connection) == {odd: SHARED, BEN: OTHER}


def test_placeholders_of_different_rows_differ() -> None:
    ids = [*ODD_IDS.values(), "v" * 255, "google:43", ANN, "a" * 200, "a" * 201]
    placeholders = {placeholder_address(clerk_id) for clerk_id in ids}
    assert len(placeholders) == len(ids)
    assert max(map(len, placeholders)) <= 255
    assert placeholder_address(ANN) == f"{ANN}@placeholder.invalid"


# Another's placeholder


@pytest.mark.parametrize("has_signed_in", [False, True])
def test_a_row_that_holds_the_placeholder_of_another_gives_it_to_that_user(
    database: Database, connection: Connection, *, has_signed_in: bool
) -> None:
    long = "u" * 255
    existing(connection, CAT, placeholder_address(ANN))
    existing(connection, "google:42", placeholder_address(CAT))
    existing(connection, long, placeholder_address("google:42"))
    if has_signed_in:
        batches(database, [signed_in(CAT, 1)])
    batches(database, [saved(ANN, 2, None), saved(BEN, 2, OTHER)])
    assert emails(connection) == {
        BEN: OTHER,
        **{clerk_id: placeholder_address(clerk_id) for clerk_id in (ANN, CAT, "google:42", long)},
    }
    claimed = connection.execute("SELECT claimed_email FROM user_sync WHERE claimed_email IS NOT NULL")
    assert [found["claimed_email"] for found in claimed] == [OTHER]


def test_a_placeholder_is_taken_from_another_row(database: Database, connection: Connection) -> None:
    batches(database, [saved(ANN, 1, SHARED)])
    existing(connection, CAT, placeholder_address(ANN))
    batches(database, [saved(BEN, 2, SHARED)])
    assert emails(connection) == {ANN: placeholder_address(ANN), BEN: SHARED, CAT: placeholder_address(CAT)}


def test_a_value_that_the_applications_own_index_refuses_reads_no_table_from_end_to_end(
    database: Database, connection: Connection
) -> None:
    connection.execute("CREATE UNIQUE INDEX ours ON users (name)")
    existing(connection, CAT, placeholder_address(BEN), name="name 1")
    checkouts = count_checkouts(database)
    with pytest.raises(ChangeRefused, match=r"\(SQLSTATE 23505, constraint ours\)$"):
        batches(database, [saved(ANN, 1, None)])
    assert checkouts() == RACE_ATTEMPTS
    assert emails(connection) == {CAT: placeholder_address(BEN)}


# Any time


@pytest.mark.parametrize("moment", ODD_TIMES)
def test_a_row_of_any_time_takes_every_event(moment: str, database: Database, connection: Connection) -> None:
    existing(connection, ANN, SHARED, created_at=moment, last_login_at=moment)
    assert drift.read(database, [ANN])[ANN].user is not None
    assert drift.find(database, ANN) is not None
    batches(database, [signed_in(ANN, 5)], [saved(BEN, 6, SHARED)], [saved(ANN, 7, OTHER)])
    found = row(connection, ANN)
    assert (found["email"], found["created_at"]) == (OTHER, to_datetime(NOW))
    assert found["last_login_at"] == to_datetime(NOW + 5), "a time beyond every calendar is no login"


def test_columns_without_a_time_zone_are_read_and_written_in_utc(
    database: Database, connection: Connection
) -> None:
    existing(connection, BEN, OTHER, created_at="infinity")
    connection.execute(
        "ALTER TABLE users ALTER created_at TYPE timestamp(3), ALTER last_login_at TYPE timestamp(3)"
    )
    batches(database, [saved(ANN, 1, SHARED), signed_in(ANN, 5)])
    batches(database, [saved(ANN, 6, SHARED), saved(BEN, 7, OTHER)])
    assert drift.read(database, [ANN])[ANN].user == UserRow(
        ANN, SHARED, "name 6", "Acme", "user", to_datetime(NOW), to_datetime(NOW + 5)
    )
    assert row(connection, ANN)["created_at"] == to_datetime(NOW).replace(tzinfo=None)
    assert row(connection, BEN)["last_login_at"] is None


# What the application added to the table


def test_what_the_application_added_stays_untouched(database: Database, connection: Connection) -> None:
    connection.execute("""
        ALTER TABLE users ADD plan text, ADD points int NOT NULL DEFAULT 7;
        CREATE UNIQUE INDEX users_lower ON users (lower(email));
        CREATE TABLE orders (id serial, user_id uuid REFERENCES users (id) ON DELETE SET NULL);
        CREATE TABLE seen (what text);
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO seen VALUES (TG_OP); RETURN NULL; END $$;
        CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON users FOR EACH ROW EXECUTE FUNCTION see();
    """)
    batches(database, [saved(ANN, 1, SHARED), saved(BEN, 1, OTHER)])
    connection.execute("UPDATE users SET plan = 'gold', points = 8 WHERE clerk_id = %s", [ANN])
    connection.execute("INSERT INTO orders (user_id) SELECT id FROM users; DELETE FROM seen")
    batches(database, [saved(ANN, 2, OTHER), saved(BEN, 2, None)], [signed_in(ANN, 3)], [deleted(BEN, 4)])
    found = row(connection, ANN)
    assert (found["plan"], found["points"], found["email"]) == ("gold", 8, OTHER)
    seen = [entry["what"] for entry in connection.execute("SELECT what FROM seen")]
    assert seen == ["UPDATE"] * 3 + ["DELETE"]
    assert connection.execute("SELECT count(user_id) AS kept FROM orders").fetchone() == {"kept": 1}
    migration.upgrade(database)
    assert connection.execute("SELECT indexname FROM pg_indexes WHERE indexname = 'users_lower'").fetchone()


def test_a_row_is_written_once_when_it_changes_only(database: Database, connection: Connection) -> None:
    batches(database, [saved(ANN, 1, SHARED), saved(BEN, 1, OTHER)])
    connection.execute("""
        CREATE TABLE seen (what text);
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (NEW.clerk_id || ' ' || NEW.email); RETURN NULL;
        END $$;
        CREATE TRIGGER see AFTER INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION see();
    """)
    batches(database, [saved(ANN, 1, SHARED), saved(BEN, 1, OTHER), saved(ANN, 0, None)])
    assert written(connection) == []
    # Ann takes what Ben has, Ben one that no user has: no address stands at the placeholder in between.
    batches(database, [saved(ANN, 2, OTHER), saved(BEN, 2, "new@example.com")])
    assert written(connection) == [f"{BEN} new@example.com", f"{ANN} {OTHER}"]
    batches(database, [saved(CAT, 3, OTHER)])
    assert written(connection) == [f"{ANN} {placeholder_address(ANN)}", f"{CAT} {OTHER}"]
    batches(database, [deleted(CAT, 4)])
    assert written(connection) == [f"{ANN} {OTHER}"]


def written(connection: Connection) -> list[Any]:
    """Return what the trigger saw since the last call."""
    return [entry["what"] for entry in connection.execute("DELETE FROM seen RETURNING what")]


@pytest.mark.parametrize("column", ["role", "organization"])
def test_an_owned_column_is_in_no_statement(column: str, database: Database, connection: Connection) -> None:
    connection.execute(f"""
        ALTER TABLE users ALTER {column} SET DEFAULT 'admin', ALTER {column} SET NOT NULL;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'ours'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE OF {column} ON users FOR EACH ROW EXECUTE FUNCTION refuse();
    """)
    owned = Policy(owns_role=column != "role", owns_organization=column != "organization")
    for batch in ([saved(ANN, 1, SHARED)], [saved(ANN, 2, OTHER), signed_in(ANN, 3)]):
        users.apply(database, batch, owned)
    found = row(connection, ANN)
    assert (found[column], found["email"]) == ("admin", OTHER)


# What the application wrote into the sync's columns


@pytest.mark.parametrize("name", ["A", "Zoe"])
def test_what_the_application_wrote_is_overwritten_by_the_next_newer_version(
    name: str, database: Database, connection: Connection
) -> None:
    batches(database, [saved(ANN, 1, SHARED, name="Ann")])
    connection.execute("UPDATE users SET name = %s, role = 'admin'", [name])
    batches(database, [saved(ANN, 2, SHARED, name="Ann")])
    found = row(connection, ANN)
    assert (found["name"], found["role"]) == ("Ann", "user")
