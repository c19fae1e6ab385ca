"""ORGANIZATION_SOURCE=membership: stories, transactions that meet, and what it costs."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any, NamedTuple, cast

import psycopg
import pytest
import structlog.testing
from pydantic import SecretStr
from sqlalchemy import ClauseElement, Executable
from sqlalchemy.dialects.postgresql import psycopg as dialect

from db.apply import statements, users
from db.connection.engine import Database
from db.merge.change import Membership, Organization, UserChange, Version
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from tests.db.test_races import Meeting, held, meet, race, wait_until_blocked
from tests.db.test_stories import ANN, BEN, CAT, anonymous, deleted, deliveries, row, saved, signed_in
from tests.db.test_users import OURS, departures, moves, received, rivals, sign_ins, sign_ups
from tests.support.database_trial import Trial
from tests.support.histories import BatchPlan
from tests.support.payloads import (
    NOW,
    Json,
    dissolved,
    membership,
    membership_event,
    organization,
    organization_event,
)
from tests.support.reference_model import Choices, Row, SentEvent, tables
from tests.support.round_trips import TripCounter
from tests.support.settings import MakeSettings

ACME, ZOO = "org_a", "org_B"
MEMBERSHIP = Choices(organization_source="membership")
ANONYMIZE = Choices("anonymize", organization_source="membership")
PATIENCE_S = 20
FOLLOWS = Policy(owns_organization=False, follows_memberships=True)


def acme(name: object = "Acme", at: int = 0) -> Json:
    return organization(ACME, name, updated_at=NOW + at)


def zoo(name: object = "Zoo", at: int = 0) -> Json:
    return organization(ZOO, name, updated_at=NOW + at)


def joined(
    clerk_id: str,
    of: Json,
    at: int,
    id_: str | None = None,
    *,
    sent_at: int | None = None,
    verb: str = "created",
) -> Json:
    """Return the event of a membership that began then (ms after NOW)."""
    id_ = id_ or f"orgmem_{clerk_id}_{of['id']}"
    data = membership(clerk_id, of, id=id_, created_at=NOW + at, updated_at=NOW + at)
    timestamp = NOW + (at if sent_at is None else sent_at)
    return membership_event(f"organizationMembership.{verb}", data, timestamp=timestamp)


def left(clerk_id: str, of: Json, at: int, id_: str | None = None) -> Json:
    """Return the event that ends the membership that began at 1."""
    return joined(clerk_id, of, 1, id_, sent_at=at, verb="deleted")


def renamed(of: Json) -> Json:
    return organization_event(data=of, timestamp=of["updated_at"])


def closed(organization_id: str, at: int = 0) -> Json:
    return organization_event("organization.deleted", dissolved(organization_id), timestamp=NOW + at)


class OrganizationStory(NamedTuple):
    """The events, and the rows it must end in."""

    events: list[Json]
    rows: list[Row]
    choices: Choices = MEMBERSHIP


STORIES = {
    "who joins has the organization's name": OrganizationStory(
        [saved(ANN, 1), saved(BEN, 1), joined(ANN, acme(), 2)], [row(ANN, organization="Acme"), row(BEN)]
    ),
    "the organization joined last counts": OrganizationStory(
        [saved(ANN, 1), joined(ANN, zoo(), 2), joined(ANN, acme(), 3)], [row(ANN, organization="Acme")]
    ),
    "the newest event of a membership does not tell when it began": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2, sent_at=9, verb="updated"), joined(ANN, zoo(), 3)],
        [row(ANN, organization="Zoo")],
    ),
    "of two joined at once the membership with the greater id counts, by its bytes": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2, "orgmem_a"), joined(ANN, zoo(), 2, "orgmem_B")],
        [row(ANN, organization="Acme")],
    ),
    "who leaves is in the one joined before": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 1), joined(ANN, zoo(), 0), left(ANN, acme(), 5)],
        [row(ANN, organization="Zoo")],
    ),
    "who leaves all has none": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 1), left(ANN, acme(), 5)], [row(ANN)]
    ),
    "who joins again is in again": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 1), left(ANN, acme(), 5), joined(ANN, acme(), 6, "orgmem_new")],
        [row(ANN, organization="Acme")],
    ),
    "a membership that has ended stays so, whatever events follow": OrganizationStory(
        [saved(ANN, 1), left(ANN, acme(), 2), joined(ANN, acme(), 1, sent_at=9, verb="updated")], [row(ANN)]
    ),
    "an end without a time is an end": OrganizationStory(
        [
            saved(ANN, 1),
            joined(ANN, acme(), 1),
            {key: value for key, value in left(ANN, acme(), 0).items() if key != "timestamp"},
        ],
        [row(ANN)],
    ),
    "a rename reaches its members and no other user": OrganizationStory(
        [
            *(saved(clerk_id, 1) for clerk_id in (ANN, BEN, CAT)),
            joined(ANN, acme(), 2),
            joined(BEN, zoo(), 2),
            renamed(acme("New", 5)),
        ],
        [row(ANN, organization="New"), row(BEN, organization="Zoo"), row(CAT)],
    ),
    "a name is as old as the organization says": OrganizationStory(
        [saved(ANN, 1), renamed(acme("New", 5)), joined(ANN, acme("Old", 0), 9)],
        [row(ANN, organization="New")],
    ),
    "of two names with one updated_at the one observed later counts": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme("A", 0), 2), joined(BEN, acme("B", 0), 1)],
        [row(ANN, organization="A")],
    ),
    "of two names with one version the greater counts, by code point": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme("acme", 0), 2), joined(BEN, acme("Zoo", 0), 2)],
        [row(ANN, organization="acme")],
    ),
    "a deleted organization is no longer anybody's": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2), joined(ANN, zoo(), 1), closed(ACME, 3)],
        [row(ANN, organization="Zoo")],
    ),
    "a deleted organization stays so, whatever events follow": OrganizationStory(
        [saved(ANN, 1), closed(ACME), renamed(acme("New", 5)), joined(ANN, acme("New", 5), 9)], [row(ANN)]
    ),
    "an organization without a name counts once an event names it": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(None), 3), joined(ANN, zoo(), 2), renamed(acme("Acme", 4))],
        [row(ANN, organization="Acme")],
    ),
    "until then the one before counts": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(""), 3), joined(ANN, zoo(), 2)], [row(ANN, organization="Zoo")]
    ),
    "a membership without a user waits": OrganizationStory(
        [joined(ANN, acme(), 2), saved(BEN, 1)], [row(BEN)]
    ),
    "a user's JSON tells memberships": OrganizationStory(
        [saved(ANN, 1, organization_memberships=[membership(ANN, acme())])], [row(ANN, organization="Acme")]
    ),
    "and ends none by leaving it out": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2), saved(ANN, 9, organization_memberships=[])],
        [row(ANN, organization="Acme")],
    ),
    "a session's user tells memberships": OrganizationStory(
        [signed_in(ANN, 4, user=saved(ANN, 1, organization_memberships=[membership(ANN, acme())])["data"])],
        [row(ANN, login_at=4, organization="Acme")],
    ),
    "metadata says nothing of the organization, and the role as ever": OrganizationStory(
        [
            saved(ANN, 1, public_metadata={"role": "admin", "organization": "Meta"}),
            saved(BEN, 1, public_metadata={"organization": "Meta"}),
            joined(ANN, acme(), 2),
        ],
        [row(ANN, organization="Acme", role="admin"), row(BEN)],
    ),
    "a deleted user is in none": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2), deleted(ANN, 3), renamed(acme("New", 5))], []
    ),
    "an anonymous row has no organization, and gets none": OrganizationStory(
        [
            saved(ANN, 1),
            joined(ANN, acme(), 2),
            deleted(ANN, 3),
            joined(ANN, zoo(), 5),
            renamed(acme("New", 5)),
        ],
        [anonymous(ANN)],
        ANONYMIZE,
    ),
    "the name of a deleted user's organization is known all the same": OrganizationStory(
        [deleted(ANN), joined(ANN, acme("New", 5), 2), saved(BEN, 1), joined(BEN, acme("Old", 1), 2)],
        [row(BEN, organization="New")],
    ),
    "where metadata decides memberships say nothing": OrganizationStory(
        [saved(ANN, 1, public_metadata={"organization": "Meta"}), joined(ANN, acme(), 2), closed(ZOO)],
        [row(ANN, organization="Meta")],
        Choices(),
    ),
    "where the application decides they say nothing either": OrganizationStory(
        [saved(ANN, 1), joined(ANN, acme(), 2), renamed(acme("New", 5))],
        [row(ANN)],
        Choices(organization_source="none"),
    ),
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_the_model_ends_a_story_of_members_as_it_must(story: OrganizationStory) -> None:
    found = tables(deliveries(*story.events), story.choices).users
    assert found == {it.clerk_id: it for it in story.rows}


def test_the_tables_end_every_story_of_members_as_they_must_in_many_orders(trial: Trial) -> None:
    for title, story in STORIES.items():
        sent = deliveries(*story.events)
        ending = tables(sent, story.choices)._replace(users={it.clerk_id: it for it in story.rows})
        orders = list(permutations(sent))
        for order in orders[:: max(1, len(orders) // 10)]:
            for batches in ([[delivery] for delivery in order], [list(order)]):
                trial.deliver(BatchPlan(batches, workers=1), story.choices)
                assert trial.tables() == ending, title


def test_the_ledger_says_what_was_new(trial: Trial) -> None:
    sent = {
        "applied": joined(ANN, acme("Acme", 1), 2),
        "stale": joined(ANN, acme("Acme", 1), 2),
        "applied: only the name is new": joined(ANN, acme("New", 5), 2),
        "stale: the name is old": renamed(acme("Old", 3)),
        "applied: a rename": renamed(acme("Newer", 6)),
        "stale: the same again": renamed(acme("Newer", 6)),
        "ignored": renamed(acme(None, 9)),
        "applied: an end": left(ANN, acme(), 9),
        "applied: a deletion": closed(ACME, 9),
        "stale: a later deletion": closed(ACME, 10),
    }
    ones = [SentEvent(title, event, NOW) for title, event in sent.items()]
    expected = [(title, title.partition(":")[0]) for title in sent]
    for batches in ([ones], [[one] for one in ones]):
        trial.deliver(BatchPlan(batches, workers=1), MEMBERSHIP)
        found = trial.connection.execute("SELECT svix_id, outcome FROM webhook_events").fetchall()
        assert sorted(found) == sorted(expected)
    trial.deliver(BatchPlan([ones], workers=1), Choices())
    assert trial.connection.execute("SELECT DISTINCT outcome FROM webhook_events").fetchall() == [
        ("ignored",)
    ]


def test_back_at_metadata_the_next_profile_says_it_and_a_deletion_forgets_the_memberships(
    trial: Trial,
) -> None:
    first, member, late, second, gone = deliveries(
        saved(ANN, 1, public_metadata={"organization": "Meta"}),
        joined(ANN, acme(), 2),
        joined(ANN, zoo(), 3),
        saved(ANN, 4, public_metadata={"organization": "Meta"}),
        deleted(ANN),
    )
    trial.apply([first, member], MEMBERSHIP)
    assert trial.rows() == {ANN: row(ANN, organization="Acme")}
    trial.apply([late], Choices())
    assert trial.rows() == {ANN: row(ANN, organization="Acme")}
    trial.apply([second], Choices())
    assert trial.rows() == {ANN: row(ANN, organization="Meta")}
    trial.apply([gone], Choices())
    known = trial.tables()
    assert known == tables([gone], Choices())._replace(
        organizations=known.organizations, instances=known.instances
    )


def test_from_metadata_to_membership_the_next_profile_says_it(trial: Trial) -> None:
    first, second, member, again = deliveries(
        saved(ANN, 1, public_metadata={"organization": "Meta"}),
        saved(BEN, 1, public_metadata={"organization": "Meta"}),
        joined(ANN, acme(), 2),
        saved(BEN, 1, public_metadata={"organization": "Meta"}),
    )
    trial.apply([first, second], Choices())
    trial.apply([member], MEMBERSHIP)
    assert trial.rows() == {ANN: row(ANN, organization="Acme"), BEN: row(BEN, organization="Meta")}
    trial.apply([again], MEMBERSHIP)
    assert trial.rows()[BEN] == row(BEN)


def test_an_overwritten_or_removed_row_comes_back_with_its_organization(
    trial: Trial,
) -> None:
    first, member, again = deliveries(saved(ANN, 1), joined(ANN, acme(), 2), saved(ANN, 1))
    trial.apply([first, member], MEMBERSHIP)
    for statement in ("UPDATE users SET organization = 'Theirs'", "DELETE FROM users"):
        trial.connection.execute(statement)
        trial.apply([again], MEMBERSHIP)
        assert trial.rows() == {ANN: row(ANN, organization="Acme")}


# Two at once


THERE = [saved(ANN, 1), saved(BEN, 1), joined(ANN, acme(), 1)]
NEW_NAME = (renamed(acme("New", 5)), ANN)

MEETINGS = {
    "a rename, and a user joins with the old name": Meeting(THERE, NEW_NAME, (joined(BEN, acme(), 2), BEN)),
    "a rename, and a member leaves for another": Meeting(
        [*THERE, joined(BEN, acme(), 1), joined(BEN, zoo(), 0)], NEW_NAME, (left(BEN, acme(), 9), BEN)
    ),
    "a rename, and a member's profile changes": Meeting(
        THERE, NEW_NAME, (saved(ANN, 5, first_name="New"), ANN)
    ),
    "a rename, and a member signs in": Meeting(THERE, NEW_NAME, (signed_in(ANN, 5), ANN)),
    "a rename, and a member is deleted": Meeting(THERE, NEW_NAME, (deleted(ANN), ANN)),
    "a rename, and another": Meeting(THERE, NEW_NAME, (renamed(acme("Newer", 6)), ANN)),
    "a rename, and the end of the organization": Meeting(THERE, NEW_NAME, (closed(ACME), ANN)),
    "a rename, and the end of the organization joined later": Meeting(
        [*THERE, joined(ANN, zoo(), 2)], NEW_NAME, (closed(ZOO), ANN)
    ),
    "a rename, and a member who joins another and ends it": Meeting(
        [*THERE, joined(ANN, zoo(), 1, "orgmem_z")], NEW_NAME, (left(ANN, zoo(), 5, "orgmem_z"), ANN)
    ),
    "the end of an organization, and a user joins it": Meeting(
        THERE, (closed(ACME), ANN), (joined(BEN, acme(), 2), BEN)
    ),
    "two join at once, and each knows another name": Meeting(
        THERE[:2], (joined(ANN, zoo("Old", 1), 2), ANN), (joined(BEN, zoo("New", 2), 2), BEN)
    ),
    "one joins two organizations": Meeting(
        THERE, (joined(ANN, zoo(), 2), ANN), (joined(ANN, acme(), 3, "orgmem_again"), ANN)
    ),
    "one leaves both": Meeting(
        [*THERE, joined(ANN, zoo(), 1)], (left(ANN, acme(), 5), ANN), (left(ANN, zoo(), 5), ANN)
    ),
}


@pytest.mark.parametrize("choices", [MEMBERSHIP, ANONYMIZE], ids=["delete", "anonymize"])
def test_nothing_is_lost_when_two_changes_of_members_meet(trial: Trial, choices: Choices) -> None:
    with structlog.testing.capture_logs() as logs:
        for meeting in MEETINGS.values():
            meet(trial, meeting, choices)
    assert logs == [], "nothing had to be tried again"


def test_a_row_that_appears_while_its_organization_is_renamed_has_the_new_name(trial: Trial) -> None:
    *before, rename, appears = deliveries(*THERE, joined(CAT, acme(), 2), NEW_NAME[0], saved(CAT, 1))
    trial.apply(before, MEMBERSHIP)
    race(trial, ANN, [rename], [appears], MEMBERSHIP)
    assert trial.tables() == tables([*before, rename, appears], MEMBERSHIP)


def test_a_rename_waits_for_a_row_that_is_just_appearing(trial: Trial) -> None:
    # Ben's row is held, and stands in the batch beside the row that appears.
    *before, appears, ben, rename = deliveries(
        *THERE, joined(CAT, acme(), 2), saved(CAT, 1), saved(BEN, 2, first_name="New"), NEW_NAME[0]
    )
    trial.apply(before, MEMBERSHIP)
    with ThreadPoolExecutor(2) as threads:
        with held(trial, BEN):
            one = threads.submit(trial.apply, [appears, ben], MEMBERSHIP)
            wait_until_blocked(trial, 1)
            two = threads.submit(trial.apply, [rename], MEMBERSHIP)
            wait_until_blocked(trial, 2, unless=two)
            assert not two.done()
        for future in (one, two):
            future.result(PATIENCE_S)
    assert trial.tables() == tables([*before, appears, ben, rename], MEMBERSHIP)


def test_members_of_one_organization_do_not_wait_for_one_another(trial: Trial) -> None:
    *before, ann, ben = deliveries(
        *THERE, joined(BEN, acme(), 1), saved(ANN, 5, first_name="New"), saved(BEN, 5, first_name="New")
    )
    trial.apply(before, MEMBERSHIP)
    with ThreadPoolExecutor(2) as threads, structlog.testing.capture_logs() as logs:
        with held(trial, ANN):
            one = threads.submit(trial.apply, [ann], MEMBERSHIP)
            wait_until_blocked(trial, 1)
            threads.submit(trial.apply, [ben], MEMBERSHIP).result(PATIENCE_S)
            assert not one.done()
        one.result(PATIENCE_S)
    assert logs == [], "no transaction waited so long that it had to be tried again"


# What it costs


CROWD = """
    INSERT INTO users (clerk_id, email, name, organization)
        SELECT 'user_' || i, i || '@example.com', 'Some user', 'Org ' || i % 1999 + 2
        FROM generate_series(1, 20000) i;
    INSERT INTO user_sync (clerk_id, profile_updated_at, profile_observed_at,
                           claimed_email, claim_updated_at, claim_observed_at)
        SELECT 'user_' || i, 1, 1, i || '@example.com', 1, 1 FROM generate_series(1, 20000) i;
    INSERT INTO organization_sync (id, name, name_updated_at, name_observed_at)
        SELECT 'org_' || i, 'Org ' || i, 1, 1 FROM generate_series(1, 2000) i;
    INSERT INTO membership_sync (clerk_id, id, organization_id, joined_at)
        SELECT 'user_' || i % 20000 + 1, 'orgmem_' || i, 'org_' || i % 1999 + 2, 'epoch'
        FROM generate_series(1, 95000) i;
    INSERT INTO membership_sync (clerk_id, id, organization_id, joined_at)
        SELECT 'user_' || i, 'orgmem_big', 'org_1', now() FROM generate_series(1, 5000) i;
    ANALYZE;
"""
# By the bytes of the Clerk id where rows are locked, else by the key of the lock.
ORDERED = re.compile(r'LockRows .*\n +->  Sort .*\n +Sort Key: .*clerk_id COLLATE "C"|Sort Key: .*hashtext')
SOME = [f"user_{i}" for i in range(7000, 7010)]
BATCH = [f"user_{i}" for i in range(9000, 9400)]
MANY = [f"org_new_{i}" for i in range(500)]
ADDRESSES = [f"{i}@example.com" for i in range(8000, 8010)]
SET_NAMES = statements.SET_ORGANIZATIONS["name"]
STATEMENTS: dict[str, tuple[Executable, dict[str, Any]]] = {
    "lock_sync_rows": (statements.LOCK_SYNC_ROWS, {"ids": SOME}),
    "lock_addresses": (statements.LOCK_ADDRESSES, {"ids": SOME, "addresses": ADDRESSES}),
    "lock_organizations": (statements.LOCK_ORGANIZATIONS, {"ids": SOME, "changed": ["org_7"]}),
    "lock_users": (statements.LOCK_USERS, {"ids": SOME}),
    "lock_users_and_members": (statements.LOCK_USERS_AND_MEMBERS, {"ids": SOME, "changed": ["org_7"]}),
    "lock_users_and_members of many that changed": (
        statements.LOCK_USERS_AND_MEMBERS,
        {"ids": SOME, "changed": MANY},
    ),
    "lock_users_and_members of a big one": (
        statements.LOCK_USERS_AND_MEMBERS,
        {"ids": [], "changed": ["org_1"]},
    ),
    "lock_users_and_members of nothing that changed": (
        statements.LOCK_USERS_AND_MEMBERS,
        {"ids": SOME, "changed": []},
    ),
    "read_users": (statements.READ_USERS, {"ids": SOME}),
    "read_contested": (statements.READ_CONTESTED, {"ids": SOME, "addresses": ADDRESSES, "all_ids": SOME}),
    "read_contested of a full batch": (
        statements.READ_CONTESTED,
        {"ids": BATCH, "addresses": [f"{i}@example.com" for i in range(9000, 9400)], "all_ids": BATCH},
    ),
    "read_organizations": (statements.READ_ORGANIZATIONS, {"ids": ["org_7", "org_8"]}),
    "read_memberships": (statements.READ_MEMBERSHIPS, {"ids": SOME}),
    "set_organizations": (SET_NAMES, {"ids": SOME, "changed": ["org_7"]}),
    "set_organizations of many that changed": (SET_NAMES, {"ids": SOME, "changed": MANY}),
    "set_organizations of a big one": (SET_NAMES, {"ids": [], "changed": ["org_1"]}),
    "set_organizations of nothing that changed": (SET_NAMES, {"ids": SOME, "changed": []}),
    "set_emails": (statements.SET_EMAILS, {"c0": SOME, "c1": ADDRESSES}),
    "delete_users": (statements.DELETE_USERS, {"ids": SOME}),
    "delete_memberships": (statements.DELETE_MEMBERSHIPS, {"ids": SOME}),
}


@pytest.fixture
def crowd(database_url_unpooled: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database with 20,000 users in 100,000 memberships; one organization has 5,000."""
    with psycopg.connect(database_url_unpooled, autocommit=True, prepare_threshold=None) as connection:
        connection.execute(CROWD)
        yield connection


def plan_of(connection: psycopg.Connection[Any], statement: Executable, parameters: dict[str, Any]) -> str:
    compiled = cast("ClauseElement", statement).compile(dialect=dialect.dialect())
    explain = f"EXPLAIN {compiled}".encode()
    return "\n".join(line for (line,) in connection.execute(explain, {**compiled.params, **parameters}))


WHOLE_TABLE = re.compile(r"Seq Scan on (\w+)|Index (?:Only )?Scan using \w+ on (\w+).*\n(?! +Index Cond)")
FORGET_STATISTICS = """
    DELETE FROM pg_statistic;
    UPDATE pg_class SET reltuples = -1, relpages = 0 WHERE relnamespace = 'public'::regnamespace;
"""


@pytest.mark.parametrize("before", ["", FORGET_STATISTICS + "SET enable_seqscan = off"])  # as an apply does
def test_no_statement_reads_a_whole_table(crowd: psycopg.Connection[Any], before: str) -> None:
    crowd.execute(before.encode())
    for title, (statement, parameters) in STATEMENTS.items():
        plan = plan_of(crowd, statement, parameters)
        assert WHOLE_TABLE.findall(plan) == [], f"{title}\n{plan}"
        if title.startswith("lock_"):
            assert ORDERED.search(plan), f"{title}: all transactions take the same locks in the same order"


def member_of(clerk_id: str, number: int, *, ended_at: int | None = None) -> ReceivedChange:
    """Return that a user joined organization `number`, which is new."""
    name = Organization(f"org_new_{number}", Version(1, 1), "New")
    stay = Membership(f"orgmem_{clerk_id}", name.id, NOW, ended_at)
    return received(UserChange(clerk_id, memberships=(stay,), organizations=(name,)))


def joins(size: int) -> Sequence[ReceivedChange]:
    return [member_of(f"user_{size}_{i}", i) for i in range(size)]


def new_names(size: int) -> Sequence[ReceivedChange]:
    return [received(Organization(f"org_new_{i}", Version(size, 2), f"Name {size}")) for i in range(size)]


def partings(size: int) -> Sequence[ReceivedChange]:
    return [member_of(f"user_{size}_{i}", i, ended_at=NOW) for i in range(size)]


Counted = Callable[[Sequence[ReceivedChange], Policy], tuple[int, int]]


@pytest.fixture
def counted(make_settings: MakeSettings, database_url: str) -> Iterator[Counted]:
    """Apply a batch, and return how many round trips and how many statements that took."""
    with TripCounter(database_url) as counter:
        url = SecretStr(counter.url)
        database = Database(make_settings(database_url=url, database_url_unpooled=None, redis_url=None))
        users.apply(database, [received(UserChange("user_first", login_at=1))], FOLLOWS)

        def apply(batch: Sequence[ReceivedChange], policy: Policy) -> tuple[int, int]:
            with counter.counting() as trips:
                users.apply(database, batch, policy)
            return trips.count, count_statements(trips.sent)

        yield apply
        database.dispose()


def count_statements(sent: bytes) -> int:
    """Count the statements in what a client sent: Parse messages of PostgreSQL's extended protocol.

    Each message is a letter and its length, https://www.postgresql.org/docs/current/protocol-overview.html.
    """
    found, at = 0, 0
    while at < len(sent):
        found += sent[at : at + 1] == b"P"
        at += 1 + int.from_bytes(sent[at + 1 : at + 5], "big")
    return found


@pytest.mark.parametrize(
    ("policy", "shapes"),
    [
        (OURS, (sign_ups, rivals, sign_ins, moves, departures)),
        (FOLLOWS, (sign_ups, joins, new_names, partings, departures)),
    ],
    ids=["users", "members"],
)
def test_a_batch_is_two_round_trips_and_as_many_statements_whatever_its_size(
    counted: Counted, policy: Policy, shapes: Sequence[Callable[[int], Sequence[ReceivedChange]]]
) -> None:
    for shape in shapes:
        seen = {counted(shape(size), policy) for size in (1, 10, 100)}
        ((round_trips, _),) = seen
        assert round_trips == 2, shape.__name__


def test_renaming_a_big_organization_costs_no_more(crowd: psycopg.Connection[Any], counted: Counted) -> None:
    small = counted([received(Organization("org_2", Version(2, 2), "New"))], FOLLOWS)
    began = time.perf_counter()
    big = counted([received(Organization("org_1", Version(2, 2), "Newer"))], FOLLOWS)
    took = time.perf_counter() - began
    assert small == big
    assert took < 10
    named = crowd.execute("SELECT count(*) FROM users WHERE organization = 'Newer'").fetchone()
    assert named == (5000,)
