"""Short stories and the rows they must end in, written down by hand: for the tables and for the model."""

from collections.abc import Mapping
from itertools import permutations
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.support.database_trial import Trial
from tests.support.histories import LAST_MS, BatchPlan
from tests.support.payloads import (
    ABSENT,
    NOW,
    Json,
    deleted_event,
    email_entry,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.reference_model import Choices, ExpectedTables, Row, SentEvent, tables

ANN, BEN, CAT = "user_a", "user_B", "user_b"  # by their bytes "B" < "a" < "b"
SHARED, OTHER = "shared@example.com", "other@example.com"
NO_USERS: Mapping[str, int] = MappingProxyType({})
DELETE = Choices()
ANONYMIZE = Choices(user_deletion="anonymize")


def saved(clerk_id: str, at: int, email: str | None = None, **fields: Any) -> Json:
    """Return user.updated with that version (ms after NOW), and the Clerk id as name."""
    fields = {"first_name": clerk_id, "last_name": None, "created_at": NOW, "updated_at": NOW + at, **fields}
    return user_event("user.updated", user(clerk_id, email, **fields), timestamp=NOW + at)


def unverified(clerk_id: str, at: int, email: str) -> Json:
    """Return what `saved` returns, of a user who has not verified the address."""
    entry = email_entry(email, verified=False)
    return saved(clerk_id, at, email, email_addresses=[entry], primary_email_address_id=entry["id"])


def deleted(clerk_id: str, at: int = 0) -> Json:
    return deleted_event(clerk_id, timestamp=NOW + at)


def signed_in(clerk_id: str, at: int, **fields: Any) -> Json:
    return session_event(data=session(clerk_id, created_at=NOW + at, **fields), timestamp=NOW + at)


def row(clerk_id: str, email: str | None = None, login_at: int | None = None, **columns: Any) -> Row:
    """Return the row that `saved` makes; without an address the placeholder."""
    login = None if login_at is None else NOW + login_at
    address = email or f"{clerk_id}@placeholder.invalid"
    return Row(clerk_id, address, clerk_id, None, "user", NOW, login)._replace(**columns)


def anonymous(clerk_id: str) -> Row:
    return row(clerk_id, name="Deleted user")


class UserStory(NamedTuple):
    """The events, and the rows it must end in; `deleted` and `waiting` are ms after NOW."""

    events: list[Json]
    rows: list[Row]
    deleted: Mapping[str, int] = NO_USERS
    waiting: Mapping[str, int] = NO_USERS
    choices: Choices = DELETE


STORIES = {
    "created and updated alike make the row": UserStory(
        [
            saved(ANN, 1, "a@example.com"),
            user_event("user.created", user(BEN, "b@example.com", first_name=BEN, last_name=None)),
        ],
        [row(ANN, "a@example.com"), row(BEN, "b@example.com")],
    ),
    "a user without an address has a placeholder": UserStory([saved(ANN, 1, None)], [row(ANN)]),
    "a user whose address cannot be stored has a placeholder": UserStory(
        [saved(ANN, 1, "no address")], [row(ANN)]
    ),
    "no user gets another user's placeholder": UserStory(
        [saved(ANN, 9, f"{BEN}@placeholder.invalid"), saved(BEN, 1)], [row(ANN), row(BEN)]
    ),
    "of two who claim an address the newer claim has it": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 2, SHARED)], [row(ANN), row(BEN, SHARED)]
    ),
    "of two claims with one updated_at the later observed has it": UserStory(
        [saved(ANN, 1, SHARED), user_event(data={**saved(BEN, 1, SHARED)["data"]}, timestamp=NOW + 2)],
        [row(ANN), row(BEN, SHARED)],
    ),
    "of two claims with one version the greater id has it, by its bytes": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 1, SHARED)], [row(ANN, SHARED), row(BEN)]
    ),
    "a verified claim goes before a newer one that is not": UserStory(
        [saved(ANN, 1, SHARED), unverified(BEN, 2, SHARED)], [row(ANN, SHARED), row(BEN)]
    ),
    "of two claims that are not verified the newer has it": UserStory(
        [unverified(ANN, 1, SHARED), unverified(BEN, 2, SHARED)], [row(ANN), row(BEN, SHARED)]
    ),
    "who verifies the address takes it": UserStory(
        [saved(ANN, 1, SHARED), unverified(BEN, 2, SHARED), saved(BEN, 3, SHARED)],
        [row(ANN), row(BEN, SHARED)],
    ),
    "what a verified holder lets go, one who is not verified gets": UserStory(
        [saved(ANN, 1, SHARED), unverified(BEN, 2, SHARED), saved(ANN, 3, OTHER)],
        [row(ANN, OTHER), row(BEN, SHARED)],
    ),
    "of claims that wait a verified one is next": UserStory(
        [saved(ANN, 1, SHARED), unverified(BEN, 2, SHARED), saved(CAT, 3, SHARED), saved(CAT, 4, OTHER)],
        [row(ANN, SHARED), row(BEN), row(CAT, OTHER)],
    ),
    "addresses that differ in case are two": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 2, SHARED.upper())], [row(ANN, SHARED), row(BEN, SHARED.upper())]
    ),
    "what the holder lets go, the next claim gets": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 2, SHARED), saved(BEN, 3, OTHER)],
        [row(ANN, SHARED), row(BEN, OTHER)],
    ),
    "the next claim is the greatest of the others": UserStory(
        [saved(ANN, 1, SHARED), saved(CAT, 1, SHARED), saved(BEN, 2, SHARED), saved(BEN, 3, None)],
        [row(ANN), row(CAT, SHARED), row(BEN)],
    ),
    "of claims that wait with one updated_at the later observed is next": UserStory(
        [
            user_event(data=saved(BEN, 1, SHARED)["data"], timestamp=NOW + 3),
            user_event(data=saved(ANN, 1, SHARED)["data"], timestamp=NOW + 2),
            saved(CAT, 2, SHARED),
            saved(CAT, 3),
        ],
        [row(ANN), row(BEN, SHARED), row(CAT)],
    ),
    "of claims that wait with one version the greater id is next, by its bytes": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 1, SHARED), saved(CAT, 2, SHARED), saved(CAT, 3)],
        [row(ANN, SHARED), row(BEN), row(CAT)],
    ),
    "what a deleted holder had, the next claim gets": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 2, SHARED), deleted(BEN)], [row(ANN, SHARED)], {BEN: 0}
    ),
    "the same when the deleted one stays as an anonymous row": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 2, SHARED), deleted(BEN)],
        [row(ANN, SHARED), anonymous(BEN)],
        {BEN: 0},
        choices=ANONYMIZE,
    ),
    "a newer claim of a deleted user counts for nothing": UserStory(
        [deleted(BEN), saved(ANN, 1, SHARED), saved(BEN, 9, SHARED)], [row(ANN, SHARED)], {BEN: 0}
    ),
    "two who exchange their addresses have them": UserStory(
        [saved(ANN, 1, SHARED), saved(BEN, 1, OTHER), saved(ANN, 2, OTHER), saved(BEN, 2, SHARED)],
        [row(ANN, OTHER), row(BEN, SHARED)],
    ),
    "addresses move on along a chain": UserStory(
        [
            saved(ANN, 1, SHARED),
            saved(ANN, 2, OTHER),
            saved(BEN, 3, SHARED),
            saved(BEN, 4, None),
            saved(CAT, 5, SHARED),
        ],
        [row(ANN, OTHER), row(BEN), row(CAT, SHARED)],
    ),
    "a claim that lost keeps waiting through newer profiles that say nothing of the address": UserStory(
        [
            saved(ANN, 1, SHARED),
            saved(BEN, 2, SHARED),
            saved(ANN, 5, SHARED, primary_email_address_id="idn_unlisted"),
            saved(BEN, 6, OTHER),
        ],
        [row(ANN, SHARED), row(BEN, OTHER)],
    ),
    "a claim is as old as its own payload": UserStory(
        [
            saved(ANN, 1, SHARED),
            saved(ANN, 5, email_addresses=[], primary_email_address_id="idn_unlisted"),
            saved(BEN, 3, SHARED),
        ],
        [row(ANN), row(BEN, SHARED)],
    ),
    "the first verified address is claimed where there is no primary id": UserStory(
        [
            saved(
                ANN,
                1,
                email_addresses=[email_entry(OTHER, verified=False), email_entry(SHARED)],
                primary_email_address_id=None,
            ),
            saved(BEN, 0, SHARED),
        ],
        [row(ANN, SHARED), row(BEN)],
    ),
    "a deletion stays, whatever comes after": UserStory(
        [
            saved(ANN, 1, SHARED),
            deleted(ANN, 2),
            saved(ANN, 9, SHARED),
            signed_in(ANN, 10, user=saved(ANN, 11)["data"]),
        ],
        [],
        {ANN: 2},
    ),
    "a deletion of a user never seen": UserStory([deleted(ANN, 5), deleted(ANN, 3)], [], {ANN: 3}),
    "a deletion without a time": UserStory([deleted_event(ANN, timestamp=ABSENT)], [], {ANN: 90}),
    "an anonymous row, whichever came first": UserStory(
        [
            saved(
                ANN, 1, SHARED, public_metadata={"role": "admin", "organization": "Acme"}, last_sign_in_at=NOW
            ),
            deleted(ANN, 2),
            signed_in(ANN, 1),
        ],
        [anonymous(ANN)],
        {ANN: 2},
        choices=ANONYMIZE,
    ),
    "an anonymous row keeps the newest profile's created_at": UserStory(
        [saved(ANN, 1, created_at=NOW + 7), saved(ANN, 2, created_at=NOW + 3), deleted(ANN)],
        [anonymous(ANN)._replace(created_at=NOW + 3)],
        {ANN: 0},
        choices=ANONYMIZE,
    ),
    "one version with two times of creation, anonymous or not": UserStory(
        [
            saved(ANN, 1, created_at=NOW + 7, first_name="A"),
            saved(ANN, 1, created_at=NOW + 3, first_name="Z"),
            deleted(ANN),
        ],
        [anonymous(ANN)._replace(created_at=NOW + 7)],
        {ANN: 0},
        choices=ANONYMIZE,
    ),
    "a deletion of a user without a profile makes no anonymous row": UserStory(
        [signed_in(ANN, 1), deleted(ANN)], [], {ANN: 0}, choices=ANONYMIZE
    ),
    "a sign-in waits for its user": UserStory([signed_in(ANN, 4)], [], waiting={ANN: 4}),
    "the user who comes has the sign-in that waited": UserStory(
        [signed_in(ANN, 4), signed_in(ANN, 2), saved(ANN, 1)], [row(ANN, login_at=4)]
    ),
    "a sign-in by staff is none": UserStory(
        [signed_in(ANN, 4, actor={"sub": "user_staff"}), signed_in(ANN, 2), saved(ANN, 1)],
        [row(ANN, login_at=2)],
    ),
    "a session brings its user": UserStory(
        [signed_in(ANN, 4, user=saved(ANN, 1, SHARED)["data"])], [row(ANN, SHARED, login_at=4)]
    ),
    "times at both ends of what can be stored": UserStory(
        [
            saved(ANN, 1, created_at=0, last_sign_in_at=LAST_MS),
            saved(BEN, 1, created_at=LAST_MS, last_sign_in_at=0),
        ],
        [row(ANN, created_at=0, last_login_at=LAST_MS), row(BEN, created_at=LAST_MS, last_login_at=0)],
    ),
    "role and organization from metadata": UserStory(
        [saved(ANN, 1, public_metadata={"role": "admin", "organization": "Acme"})],
        [row(ANN, role="admin", organization="Acme")],
    ),
    "role and organization left to the application": UserStory(
        [saved(ANN, 1, public_metadata={"role": "admin", "organization": "Acme"})],
        [row(ANN)],
        choices=Choices(role_source="none", organization_source="none"),
    ),
}


def deliveries(*events: Json) -> list[SentEvent]:
    """Return one delivery for each event, all received 90 ms after NOW."""
    return [SentEvent(f"msg_{i}", event, NOW + 90) for i, event in enumerate(events)]


def ending(story: UserStory) -> ExpectedTables:
    """Return the tables that `story` must end in."""
    return ExpectedTables(
        {row.clerk_id: row for row in story.rows},
        {clerk_id: NOW + at for clerk_id, at in story.deleted.items()},
        {clerk_id: NOW + at for clerk_id, at in story.waiting.items()},
    )


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_the_model_ends_a_story_as_it_must(story: UserStory) -> None:
    ends = tables(deliveries(*story.events), story.choices)
    assert ends == ending(story)._replace(instances=ends.instances)


def test_the_tables_end_every_story_as_they_must_in_every_order(trial: Trial) -> None:
    tell_all(trial)


def test_every_story_ends_the_same_where_the_database_sorts_by_a_language(trial: Trial) -> None:
    trial.collate()
    tell_all(trial)


ORDERS = 12  # of a story's, at most


def tell_all(trial: Trial) -> None:
    for title, story in STORIES.items():
        orders = list(permutations(deliveries(*story.events)))
        for order in orders[:: -(-len(orders) // ORDERS)]:  # evenly: those beside each other begin alike
            for batches in ([[delivery] for delivery in order], [list(order)]):
                trial.deliver(BatchPlan(batches, workers=1), story.choices)
                ends = tables(order, story.choices)
                assert trial.tables() == ending(story)._replace(instances=ends.instances), title


def test_columns_that_the_application_owns_stay_as_it_wrote_them(trial: Trial) -> None:
    owned = Choices("anonymize", role_source="none", organization_source="none")
    metadata = {"role": "user", "organization": "Acme"}
    first, second, same, gone = deliveries(
        saved(ANN, 1, public_metadata=metadata),
        saved(ANN, 2, SHARED, public_metadata=metadata),
        saved(ANN, 2, SHARED, public_metadata={}),
        deleted(ANN),
    )
    trial.apply([first], owned)
    trial.connection.execute("UPDATE users SET role = 'admin', organization = 'Theirs'")
    for delivery in (second, same):
        trial.apply([delivery], owned)
        assert trial.rows()[ANN] == row(ANN, SHARED, role="admin", organization="Theirs")
    trial.apply([gone], owned)
    assert trial.rows()[ANN] == anonymous(ANN)


@pytest.mark.parametrize("events", [[], [signed_in(ANN, 6)]], ids=["nothing more", "a sign-in"])
def test_a_removed_row_claims_nothing(trial: Trial, events: list[Json]) -> None:
    holder, *others = deliveries(saved(ANN, 5, SHARED), *events, saved(BEN, 1, SHARED))
    trial.apply([holder], DELETE)
    trial.connection.execute("DELETE FROM users")
    trial.apply(others, DELETE)
    assert trial.rows() == {BEN: row(BEN, SHARED)}


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Etc/GMT+12"])
def test_no_time_that_clerk_can_send_is_too_late_for_a_time_zone(trial: Trial, zone: str) -> None:
    name = trial.connection.info.dbname
    trial.connection.execute(f"ALTER DATABASE \"{name}\" SET timezone = '{zone}'")
    trial.forget_connections()
    for last in (LAST_MS, 253_402_300_799_999):
        sent = deliveries(
            saved(ANN, 1, last_sign_in_at=last), saved(BEN, 1, created_at=last), deleted(CAT, last - NOW)
        )
        for delivery in (*sent, *sent):
            trial.apply([delivery], DELETE)
        assert trial.rows().keys() == {ANN, BEN}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_the_instance_that_spoke_of_a_user_last_is_kept(trial: Trial, order: tuple[int, ...]) -> None:
    events = [
        {**saved(ANN, 1), "instance_id": "ins_one"},
        {**saved(ANN, 2), "instance_id": "ins_two"},
        {**deleted(BEN, 3), "instance_id": "ins_three"},
        saved(CAT, 4),
    ]
    del events[3]["instance_id"]
    sent = deliveries(*events)
    trial.deliver(BatchPlan([[sent[i]] for i in order], workers=1), DELETE)
    assert trial.tables().instances == {ANN: (NOW + 2, "ins_two"), BEN: (NOW + 3, "ins_three")}
    seen = trial.connection.execute("SELECT id FROM instance_sync ORDER BY id").fetchall()
    assert seen == [("ins_one",), ("ins_three",), ("ins_two",)]
