"""The tables are a function of the set of events: whatever the order, repetition, batches and workers.

    HYPOTHESIS_PROFILE=thorough THOROUGH_S=300 pytest tests/db/test_histories.py -k thorough

goes on for that many seconds and says how much it tried.
"""

import os
import time
from itertools import islice
from random import Random

import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.database_trial import WORKERS, Trial, expected_ledger
from tests.support.histories import (
    World,
    casts,
    casts_of_members,
    choices,
    choices_of_source,
    histories,
    orderly_histories,
    plans,
)
from tests.support.hypothesis_settings import no_deadline
from tests.support.reference_model import Choices, Row, SentEvent, tables

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
THOROUGH_S = int(os.environ.get("THOROUGH_S", "300"))
# Rows of users who cannot be at Clerk, and of one who may be.
FOREIGN_ROWS = """
    INSERT INTO users (clerk_id, email, name, created_at) VALUES
        ('google:42', 'ann@example.com', 'Theirs', '2020-01-01Z'),
        ('x', 'Zoe@example.com', 'Theirs', '2020-01-01Z'),
        ('user_a', 'zoë@münchen.example', 'Theirs', '2020-01-01Z')
"""


def explore(
    trial: Trial,
    *,
    max_examples: int,
    plans_each: int,
    max_size: int | None = None,
    with_organizations: bool = False,
) -> None:
    """Deliver histories, each in several ways, and compare the tables with the model.

    They are wild ones of that size; without a size what Clerk may really send, and the tables are compared
    with Clerk too.
    """
    cast = casts_of_members if with_organizations else casts
    generated = (
        orderly_histories(24 if with_organizations else 16, cast)
        if max_size is None
        else histories(max_size, cast)
    )

    @settings(no_deadline, max_examples=max_examples, database=None)
    @given(generated, choices_of_source if with_organizations else choices, st.randoms(use_true_random=False))
    def tables_equal_the_model(made: World | list[SentEvent], chosen: Choices, random: Random) -> None:
        trial.tried["histories"] += 1
        deliveries = made.deliveries() if isinstance(made, World) else made
        for plan in islice(plans(deliveries, random, workers=WORKERS), plans_each):
            trial.deliver(plan, chosen)
            assert trial.tables() == tables(deliveries, chosen)
            assert trial.ledger() == expected_ledger(deliveries)
            if isinstance(made, World):
                assert living_rows(trial, made) == at_clerk(made, chosen)

    tables_equal_the_model()


def living_rows(trial: Trial, world: World) -> dict[str, Row]:
    """Return the rows of users who are not deleted at Clerk."""
    living = {person.clerk_id for person in world.living()}
    return {clerk_id: row for clerk_id, row in trial.rows().items() if clerk_id in living}


def at_clerk(world: World, chosen: Choices) -> dict[str, Row]:
    """Return the rows that Clerk's own state makes."""
    follows = chosen.organization_source == "membership"
    return {
        person.clerk_id: Row(
            clerk_id=person.clerk_id,
            email=person.address or f"{person.clerk_id}@placeholder.invalid",
            name=person.name,
            organization=world.organization_of(person, chosen.organization_value) if follows else None,
            role="user",
            created_at=person.created_at,
            last_login_at=person.last_login_at,
        )
        for person in world.living()
    }


with_and_without_organizations = pytest.mark.parametrize(
    "with_organizations", [False, True], ids=["users", "members"]
)


@with_and_without_organizations
def test_any_history_delivered_in_any_way_ends_as_the_model_says(
    trial: Trial, with_organizations: bool
) -> None:
    explore(trial, max_size=16, max_examples=25, plans_each=4, with_organizations=with_organizations)


@with_and_without_organizations
def test_what_clerk_tells_delivered_in_any_way_ends_as_it_is_at_clerk(
    trial: Trial, with_organizations: bool
) -> None:
    explore(trial, max_examples=20, plans_each=3, with_organizations=with_organizations)


@with_and_without_organizations
def test_workers_that_meet_in_the_same_rows_do_no_harm(trial: Trial, with_organizations: bool) -> None:
    trial.dawdle()
    with structlog.testing.capture_logs() as logs:
        explore(trial, max_size=30, max_examples=10, plans_each=3, with_organizations=with_organizations)
    assert trial.deadlocks() == 0
    assert logs == []


@pytest.mark.parametrize("dawdling", [False, True], ids=["fast", "dawdling"])
def test_rows_that_the_application_wrote_end_the_same_whatever_the_batches(
    trial: Trial, *, dawdling: bool
) -> None:
    if dawdling:
        trial.dawdle()

    @settings(no_deadline, max_examples=8 if dawdling else 20, database=None)
    @given(histories(16), choices, st.randoms(use_true_random=False))
    def tables_are_equal(deliveries: list[SentEvent], chosen: Choices, random: Random) -> None:
        ends = []
        for plan in islice(plans(deliveries, random, workers=WORKERS), 4):
            trial.deliver(plan, chosen, FOREIGN_ROWS)
            ends.append((trial.tables(), trial.ledger()))
        assert ends == ends[:1] * len(ends)

    tables_are_equal()


def test_the_language_that_the_database_sorts_by_decides_nothing(trial: Trial) -> None:
    trial.collate()
    for told_of_members in (False, True):
        explore(trial, max_size=12, max_examples=20, plans_each=3, with_organizations=told_of_members)


@pytest.mark.skipif(not THOROUGH, reason="HYPOTHESIS_PROFILE=thorough runs it")
@pytest.mark.timeout(THOROUGH_S + 120)
@pytest.mark.parametrize("dawdling", [False, True], ids=["fast", "dawdling"])
def test_thorough(
    trial: Trial, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], *, dawdling: bool
) -> None:
    if dawdling:
        trial.dawdle()
    end = time.monotonic() + THOROUGH_S / 2
    with structlog.testing.capture_logs() as logs:
        while time.monotonic() < end:
            for told_of_members in (False, True):
                explore(
                    trial, max_size=30, max_examples=10, plans_each=10, with_organizations=told_of_members
                )
                explore(trial, max_examples=5, plans_each=10, with_organizations=told_of_members)
    retries = sum(entry["event"] == "database retry" for entry in logs)
    figures = {**trial.tried, "differences": 0, "retries": retries, "deadlocks": trial.deadlocks()}
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    with capsys.disabled():
        reporter.write_line("\n" + ", ".join(f"{name} {count:,}" for name, count in figures.items()))
