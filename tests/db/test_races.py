"""Transactions that meet at a point of our choosing: one holds rows, the others queue up behind it."""

import time
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any

import psycopg
import pytest
import structlog.testing

from tests.db.test_stories import (
    ANN,
    BEN,
    CAT,
    DELETE,
    OTHER,
    SHARED,
    deliveries,
    saved,
    signed_in,
)
from tests.support.database_trial import WORKERS, Trial
from tests.support.histories import BatchPlan
from tests.support.payloads import NOW, Json, deleted_event
from tests.support.reference_model import Choices, SentEvent, tables

DAN = "user_d"
PATIENCE_S = 20


@contextmanager
def held(trial: Trial, clerk_id: str) -> Iterator[psycopg.Connection]:
    """Hold that user's row in `users` until the end of the block."""
    with psycopg.connect(trial.url, prepare_threshold=None) as connection:
        connection.execute("SELECT FROM users WHERE clerk_id = %s FOR UPDATE", [clerk_id])
        yield connection


def wait_until_blocked(trial: Trial, count: int, *, unless: Future[None] | None = None) -> None:
    """Return when `count` transactions wait for a lock, or `unless` has ended without any waiting."""
    deadline = time.monotonic() + PATIENCE_S
    while not (unless and unless.done()):
        row = trial.connection.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
        if row and row[0] >= count:
            return
        assert time.monotonic() < deadline, "no transaction waits for a lock"
        time.sleep(0.005)


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


def test_an_address_is_handed_over_when_its_claim_comes_while_the_holder_lets_go(trial: Trial) -> None:
    sent = deliveries(saved(ANN, 5, SHARED), saved(ANN, 9, OTHER), saved(BEN, 1, SHARED))
    trial.apply(sent[:1], DELETE)
    race(trial, ANN, [sent[1]], [sent[2]])
    assert_as_modelled(trial, sent)


def test_an_address_is_handed_over_when_its_holder_lets_go_while_the_claim_comes(trial: Trial) -> None:
    sent = deliveries(
        saved(ANN, 5, SHARED), saved(BEN, 0), saved(BEN, 1, SHARED, first_name="New"), saved(ANN, 9, OTHER)
    )
    trial.apply(sent[:2], DELETE)
    race(trial, BEN, [sent[2]], [sent[3]])
    assert_as_modelled(trial, sent)


def test_an_address_is_handed_over_when_its_holder_is_deleted_while_the_claim_comes(trial: Trial) -> None:
    sent = deliveries(saved(ANN, 5, SHARED), deleted_event(ANN), saved(BEN, 1, SHARED))
    trial.apply(sent[:1], DELETE)
    race(trial, ANN, [sent[1]], [sent[2]])
    assert_as_modelled(trial, sent)


def test_of_two_who_claim_an_address_at_once_one_has_it(trial: Trial) -> None:
    sent = deliveries(saved(ANN, 0), saved(BEN, 0), saved(ANN, 1, SHARED), saved(BEN, 2, SHARED))
    for first, second, hold in ((2, 3, ANN), (3, 2, BEN)):
        trial.reset()
        trial.apply(sent[:2], DELETE)
        race(trial, hold, [sent[first]], [sent[second]])
        assert_as_modelled(trial, sent)


def test_a_sign_in_takes_no_address_back_that_was_just_handed_over(trial: Trial) -> None:
    sent = deliveries(saved(BEN, 5, SHARED), saved(ANN, 1, SHARED), saved(BEN, 9, OTHER), signed_in(ANN, 10))
    trial.apply(sent[:2], DELETE)
    race(trial, ANN, [sent[2]], [sent[3]])
    assert_as_modelled(trial, sent)


def test_a_sign_in_gives_no_address_back_that_was_just_taken(trial: Trial) -> None:
    sent = deliveries(saved(ANN, 1, SHARED), saved(BEN, 5, SHARED), signed_in(ANN, 10))
    trial.apply(sent[:1], DELETE)
    race(trial, ANN, [sent[1]], [sent[2]])
    assert_as_modelled(trial, sent)


def test_two_changes_of_one_user_at_once_both_count(trial: Trial) -> None:
    sent = deliveries(saved(ANN, 1), saved(ANN, 5, first_name="New"), signed_in(ANN, 9))
    for first, second in ((1, 2), (2, 1)):
        trial.reset()
        trial.apply(sent[:1], DELETE)
        race(trial, ANN, [sent[first]], [sent[second]])
        assert_as_modelled(trial, sent)


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
