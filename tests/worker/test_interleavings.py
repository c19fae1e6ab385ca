"""A walk through Clerk's users and the webhooks about them, in any interleaving: the table ends as Clerk is.

    INTERLEAVINGS=2000 pytest tests/worker/test_interleavings.py

tries more of them. Each is made from its number alone.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random

import pytest
from redis import Redis

import config
from tests.support.fake_clerk import FakeClerk, Request
from tests.support.histories import (
    ADDRESSES,
    CLERK_IDS,
    ORGANIZATION_IDS,
    Cast,
    World,
    happen,
    happen_to_organizations,
)
from tests.support.payloads import Json
from tests.support.reference_model import Row
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, backfill_until, deliver, execute, open_context, rows
from worker.shutdown import Stopped, StopSignal
from worker.sync import last_run
from worker.sync.backfill import Backfill
from worker.sync.context import SyncContext
from worker.sync.reconcile import Reconcile
from worker.sync.scheduled import ScheduledReconciliation

TRIES = int(os.environ.get("INTERLEAVINGS", "5"))
pytestmark = pytest.mark.timeout(300 + 5 * TRIES)
CAST = Cast(
    [*CLERK_IDS, *(f"user_{i}" for i in range(8))],
    [*ADDRESSES, *(f"{letter}@example.com" for letter in "abcd")],
    [],
)
MEMBERS = CAST._replace(organization_ids=list(ORGANIZATION_IDS))
BY_OFFSET = [25, 30]
SIGN_UP_MS = 25  # who signs up is last updated so much later than that
ANY_REQUEST = Request("", {}, 0)
ENDS = ("user.deleted", "organizationMembership.deleted", "organization.deleted")
TABLES = "users, user_sync, webhook_events, sync_progress, membership_sync, organization_sync"


class Interleaving:
    """Things happen at Clerk, and deliveries come, whenever the fake is asked for something."""

    def __init__(self, clerk: FakeClerk, context: SyncContext, seed: int, *, loses: float) -> None:
        self.loses = loses  # that part of the deliveries, but none of `never_lost`
        self.never_lost: tuple[str, ...] = ()
        self.random = Random(seed)
        self.cast = MEMBERS if context.policy.follows_memberships else CAST
        self.world = World(self.cast.addresses)
        self.waiting: list[Json] = []
        self.name = f"interleaving {seed}"
        self.clerk = clerk
        self.context = context
        self._emitted = 0
        clerk.remove(*clerk.ids())
        clerk.knows_cursor = self.random.random() < 0.5
        # By offset, pages have to be longer than what they overlap by; of memberships there is no other way.
        by_cursor = clerk.knows_cursor and not self.cast.organization_ids
        clerk.shortens_pages_to = self.random.choice([1, 2, 5] if by_cursor else BY_OFFSET)
        clerk.remove_members(*clerk.member_ids())
        execute(context.settings, f"TRUNCATE {TABLES}")

    def happen(self, times: int) -> None:
        """Let things happen at Clerk; word of them waits, or is lost."""
        for _ in range(times):
            if self.world.people and self.cast.organization_ids and self.random.random() < 0.6:
                happen_to_organizations(self.world, self.cast, self.random)
            else:
                happen(self.world, self.cast, self.random)
        for person in self.world.people.values():
            if not person.is_deleted:
                self.clerk.put(person.json())
            elif person.clerk_id in self.clerk.ids():
                self.clerk.remove(person.clerk_id)
        self._show_members()
        emitted = self.world.emitted[self._emitted :]
        self._emitted = len(self.world.emitted)
        self.waiting += [
            event
            for event in emitted
            if event["type"] in self.never_lost or self.random.random() >= self.loses
        ]

    def _show_members(self) -> None:
        """Let Clerk show who is a member of what in the world."""
        living = self.world.living_ids()
        shown = {it.id: it.json() for it in self.world.members if it.is_in and it.clerk_id in living}
        self.clerk.remove_members(*(id_ for id_ in self.clerk.member_ids() if id_ not in shown))
        self.clerk.put_members(*shown.values())

    def deliver(self, times: int) -> None:
        """Deliver some of what waits, in any order, now and then twice."""
        for _ in range(min(times, len(self.waiting))):
            event = self.random.choice(self.waiting)
            if self.random.random() < 0.8:
                self.waiting.remove(event)
            deliver(self.context, event)

    def deliver_all(self) -> None:
        """Deliver whatever waits."""
        while self.waiting:
            self.deliver(1)

    def meanwhile(self, _: Request) -> None:
        """Let something happen before Clerk answers."""
        self.happen(self.random.randint(0, 2))
        self.deliver(self.random.randint(0, 3))

    def begin(self) -> None:
        """Let some things happen, some word of them come, and from now on more of both at any request."""
        self.happen(self.random.randint(0, 25))
        self.deliver(self.random.randint(0, 10))
        self.clerk.before = self.meanwhile

    def assert_ends_as_at_clerk(self) -> None:
        """Let nothing more happen, and deliver whatever waits: the tables are as Clerk is."""
        self.clerk.before = lambda _: None
        self.deliver_all()
        assert rows(self.context.settings) == self.rows_at_clerk(), self.name

    def rows_at_clerk(self) -> dict[str, Row]:
        """Return the rows that Clerk's own state makes."""
        return {
            person.clerk_id: Row(
                person.clerk_id,
                person.address or f"{person.clerk_id}@placeholder.invalid",
                person.name,
                self.world.organization_of(person, "name"),
                "user",
                person.created_at,
                person.last_login_at,
            )
            for person in self.world.living()
        }


Interleavings = Callable[..., Iterator[Interleaving]]


@pytest.fixture(params=["metadata", "membership"])
def interleavings(make_settings: MakeSettings, request: pytest.FixtureRequest) -> Iterator[Interleavings]:
    """Make so many, one after the other, in which that part of the deliveries is lost."""
    with FakeClerk() as clerk:
        settings: config.Settings = api_settings(make_settings, clerk, organization_source=request.param)
        with open_context(settings) as context:
            clerk.rate_limit = 10**6
            yield lambda *, loses, tries=TRIES: (
                Interleaving(clerk, context, seed, loses=loses) for seed in range(tries)
            )


def test_a_backfill_among_webhooks_ends_as_it_is_at_clerk(interleavings: Interleavings) -> None:
    for tried in interleavings(loses=0):
        tried.begin()
        Backfill(tried.context).everything(restart=True)
        tried.assert_ends_as_at_clerk()


def test_an_interrupted_backfill_among_webhooks_ends_as_it_is_at_clerk(interleavings: Interleavings) -> None:
    for tried in interleavings(loses=0):
        tried.begin()
        for _ in range(3):
            with suppress(Stopped):  # unless it was through before
                backfill_until(tried.context.settings, tried.random.randint(1, 4))
            tried.meanwhile(ANY_REQUEST)
        Backfill(tried.context).everything()
        tried.assert_ends_as_at_clerk()


def test_what_webhooks_lost_is_fetched_by_a_run_since_then_among_webhooks(
    interleavings: Interleavings,
) -> None:
    for tried in interleavings(loses=0):
        tried.happen(tried.random.randint(5, 30))
        tried.deliver_all()
        task = Backfill(tried.context)
        task.everything(restart=True)
        tried.loses, tried.never_lost = 1, ENDS
        tried.happen(tried.random.randint(1, 20))
        tried.loses = 0
        tried.clerk.shortens_pages_to = tried.random.choice(BY_OFFSET)
        tried.clerk.before = tried.meanwhile
        task.since(task.reach.newest - SIGN_UP_MS)
        tried.assert_ends_as_at_clerk()


def test_reconciliations_among_webhooks_that_lose_words_end_as_it_is_at_clerk(
    interleavings: Interleavings, redis: Redis
) -> None:
    for tried in interleavings(loses=0.5, tries=TRIES // 2):
        context = tried.context
        reconciliation = ScheduledReconciliation(
            context.settings, redis, context.database, StopSignal(), settle_s=0
        )
        tried.never_lost = ENDS
        tried.clerk.shortens_pages_to = tried.random.choice(BY_OFFSET)
        for happens in (tried.meanwhile, tried.meanwhile, none):
            tried.happen(tried.random.randint(0, 15))
            tried.deliver(tried.random.randint(0, 10))
            tried.clerk.before = happens
            redis.delete(last_run.KEY)
            reconciliation.run_if_due()
            last = last_run.load(redis)
            assert last is not None
            assert last["error"] is None, tried.name
        tried.assert_ends_as_at_clerk()


def none(_: Request) -> None:
    """Let nothing happen."""


def test_what_webhooks_lost_is_fixed_among_webhooks(interleavings: Interleavings) -> None:
    for tried in interleavings(loses=0.5):
        tried.happen(tried.random.randint(5, 30))
        tried.deliver(tried.random.randint(0, 30))
        tried.clerk.before = tried.meanwhile
        task = Reconcile(tried.context, settle_s=0, allow_deletes=100)
        report = task.report()
        if report.refusal is None:
            task.fix(report)
        tried.clerk.before = lambda _: None
        tried.deliver_all()
        if not tried.world.living():  # an empty list proves nothing
            continue
        task = Reconcile(tried.context, settle_s=0, allow_deletes=100)
        assert task.fix(task.report()) == [], tried.name
        assert rows(tried.context.settings) == tried.rows_at_clerk(), tried.name
