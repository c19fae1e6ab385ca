"""Transactions that meet at a point of our choosing: one holds rows, the others queue up behind it."""

from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any, NamedTuple

import psycopg
import pytest
import structlog.testing

from tests.db.test_stories import ANN, BEN, CAT, DELETE, OTHER, SHARED, deliveries, saved, signed_in
from tests.support.database_trial import WORKERS, Trial
from tests.support.histories import BatchPlan
from tests.support.payloads import NOW, Json, deleted_event
from tests.support.reference_model import Choices, SentEvent, tables
from tests.support.waiting import wait_until

DAN = "user_d"
PATIENCE_S = 20
BLOCKED = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@contextmanager
def held(trial: Trial, clerk_id: str) -> Iterator[psycopg.Connection]:
    """Hold that user's row in `users` until the end of the block."""
    with psycopg.connect(trial.url, prepare_threshold=None) as connection:
        connection.execute("SELECT FROM users WHERE clerk_id = %s FOR UPDATE", [clerk_id])
        yield connection


def wait_until_blocked(trial: Trial, count: int, *, unless: Future[None] | None = None) -> None:
    """Return when `count` transactions wait for a lock, or `unless` has ended without any waiting."""

    def are_blocked() -> bool:
        (waiting,) = trial.connection.execute(BLOCKED).fetchone() or (0,)
        return bool(waiting >= count)

    wait_until(lambda: (unless and unless.done()) or are_blocked(), PATIENCE_S)


def race(
    trial: Trial,
    hold: str,
    first: Sequence[SentEvent],
    second: Sequence[SentEvent],
    choices: Choices = DELETE,
) -> None:
    """Let `first` come as far as the row of `hold`, then let `second` come, then let go of the row."""
    with ThreadPoolExecutor(2) as threads:
        with held(trial, hold):
            one = threads.submit(trial.apply, first, choices)
            wait_until_blocked(trial, 1)
            two = threads.submit(trial.apply, second, choices)
            wait_until_blocked(trial, 2, unless=two)
        for future in (one, two):
            future.result(PATIENCE_S)


def assert_as_modelled(trial: Trial, sent: Sequence[SentEvent]) -> None:
    assert trial.tables() == tables(sent, DELETE)


class Meeting(NamedTuple):
    """Two events that meet: each comes as far as the row of the user beside it, and the other then comes.

    One without a user beside it only comes second.
    """

    before: list[Json]
    one: tuple[Json, str]
    other: tuple[Json, str | None]


def meet(trial: Trial, meeting: Meeting, choices: Choices) -> None:
    """Let two events meet, in each order, and compare the tables with the model."""
    before, one, other = meeting
    for (first, hold), (second, _) in ((one, other), (other, one)):
        if hold:
            sent = deliveries(*before, first, second)
            trial.reset()
            trial.apply(sent[:-2], choices)
            race(trial, hold, sent[-2:-1], sent[-1:], choices)
            assert trial.tables() == tables(sent, choices)


MEETINGS = {
    "a holder lets its address go, and a new user claims it": Meeting(
        [saved(ANN, 5, SHARED)], (saved(ANN, 9, OTHER), ANN), (saved(BEN, 1, SHARED), None)
    ),
    "a holder lets its address go, and another user claims it": Meeting(
        [saved(ANN, 5, SHARED), saved(BEN, 0)],
        (saved(ANN, 9, OTHER), ANN),
        (saved(BEN, 1, SHARED, first_name="New"), BEN),
    ),
    "a holder is deleted, and a new user claims its address": Meeting(
        [saved(ANN, 5, SHARED)], (deleted_event(ANN), ANN), (saved(BEN, 1, SHARED), None)
    ),
    "two users claim one address": Meeting(
        [saved(ANN, 0), saved(BEN, 0)], (saved(ANN, 1, SHARED), ANN), (saved(BEN, 2, SHARED), BEN)
    ),
    "an address is handed over, and its new holder signs in": Meeting(
        [saved(BEN, 5, SHARED), saved(ANN, 1, SHARED)], (saved(BEN, 9, OTHER), ANN), (signed_in(ANN, 10), ANN)
    ),
    "an address is taken, and its last holder signs in": Meeting(
        [saved(ANN, 1, SHARED)], (saved(BEN, 5, SHARED), ANN), (signed_in(ANN, 10), ANN)
    ),
    "two changes of one user": Meeting(
        [saved(ANN, 1)], (saved(ANN, 5, first_name="New"), ANN), (signed_in(ANN, 9), ANN)
    ),
}


@pytest.mark.parametrize("title", MEETINGS)
def test_nothing_is_lost_when_two_changes_meet(trial: Trial, title: str) -> None:
    meet(trial, MEETINGS[title], DELETE)


def test_what_the_application_writes_at_the_same_moment_stays(trial: Trial) -> None:
    owned = Choices(role_source="none", organization_source="none")
    first, second = deliveries(saved(ANN, 1), saved(ANN, 2, first_name="New", last_name=None))
    trial.apply([first], owned)
    with ThreadPoolExecutor(1) as threads:
        with held(trial, ANN) as application:
            applied = threads.submit(trial.apply, [second], owned)
            wait_until_blocked(trial, 1)
            application.execute("UPDATE users SET role = 'admin', organization = 'Theirs'")
        applied.result(PATIENCE_S)
    found = trial.rows()[ANN]
    assert (found.name, found.role, found.organization) == ("New", "admin", "Theirs")


@pytest.mark.parametrize("last", [ANN, BEN])
def test_rows_are_locked_in_one_order_whatever_is_written_first(trial: Trial, last: str) -> None:
    # One batch takes Ann's address, writes Dan (locked here), and gives Ben an address. The other writes Ann
    # and Ben, in the order in which PostgreSQL finds them: the row that was written last comes last.
    address = {ANN: SHARED, BEN: OTHER, CAT: OTHER, DAN: None}
    sent = deliveries(
        *(saved(clerk_id, at, claimed) for at, (clerk_id, claimed) in enumerate(address.items())),
        saved(last, 5, first_name="Again", email_addresses=[], primary_email_address_id="idn_unlisted"),
        saved(CAT, 9, SHARED),
        saved(DAN, 9, first_name="New"),
        signed_in(ANN, 10),
        signed_in(BEN, 10),
    )
    for delivery in sent[:5]:
        trial.apply([delivery], DELETE)
    with structlog.testing.capture_logs() as logs:
        race(trial, DAN, sent[5:7], sent[7:])
    assert_as_modelled(trial, sent)
    assert retries(logs) == []


def test_batches_that_move_addresses_and_batches_that_sign_in_never_deadlock(trial: Trial) -> None:
    random = Random(20260101)
    trial.dawdle()
    with structlog.testing.capture_logs() as logs:
        for _ in range(8):
            plan = crowded_plan(random)
            trial.deliver(plan, DELETE)
            assert_as_modelled(trial, [delivery for batch in plan.batches for delivery in batch])
    assert retries(logs) == []


def retries(logs: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [entry for entry in logs if entry["event"] == "database retry"]


def crowded_plan(random: Random) -> BatchPlan:
    """Return batches that sign all users in, by turns with batches in which some users move addresses."""
    crowd = [f"user_{i}" for i in range(20)]
    batches = [[saved(clerk_id, 0) for clerk_id in crowd]]
    for turn in range(1, 16):
        batches.append([signed_in(clerk_id, turn) for clerk_id in random.sample(crowd, len(crowd))])
        batches.append([claim(random, clerk_id, turn) for clerk_id in random.sample(crowd, 8)])
    numbers = count()
    return BatchPlan(
        [[SentEvent(f"msg_{next(numbers)}", event, NOW) for event in b] for b in batches], WORKERS
    )


def claim(random: Random, clerk_id: str, turn: int) -> Json:
    """Return an event that moves one of six addresses, or ends its user."""
    if random.random() < 0.01:
        return deleted_event(clerk_id)
    address = random.choice([None, *(f"{i}@example.com" for i in range(6))])
    return saved(clerk_id, random.randint(0, turn), address)
