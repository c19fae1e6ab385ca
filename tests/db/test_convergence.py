"""The merge alone, in memory: whatever the order, repetition and batching, it ends as the model says.

    HYPOTHESIS_PROFILE=thorough pytest tests/db/test_convergence.py

tries 10,000 histories, with profile fields and roles, each in three ways.
"""

import os
from collections.abc import Sequence
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from db.merge.change import Organization, UserChange, merge_organizations
from db.merge.claims import resolve
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from db.merge.rows import apply_batch, profile_row, target_row
from db.times import maybe_ms, to_ms
from tests.support.histories import casts_of_members, choices_of_source, histories, plans
from tests.support.hypothesis_settings import no_deadline
from tests.support.payloads import body
from tests.support.reference_model import Choices, Company, ExpectedTables, Row, SentEvent, Stay, tables
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
HISTORIES = 10_000 if THOROUGH else 150


class Memory:
    """What the tables would hold, but for the column `organization` where memberships decide on it."""

    def __init__(self, choices: Choices) -> None:
        chosen = config.load(_env_file=None).model_copy(update=choices._asdict())
        self._sources, self._policy = FieldSources.of(chosen), Policy.of(chosen)
        self._known: dict[str, UserChange] = {}
        self._organizations: dict[str, Organization] = {}

    def apply(self, batch: Sequence[SentEvent]) -> None:
        received = [
            incoming(it.svix_id, body(it.event).decode(), it.received_at, self._sources) for it in batch
        ]
        ids = {it.subject for it in received if isinstance(it.change, UserChange)}
        before = {clerk_id: self._known.get(clerk_id, UserChange(clerk_id)) for clerk_id in ids}
        self._known |= apply_batch(before, received, self._policy)[0]
        if self._policy.follows_memberships:
            for each in received:
                self._merge_organizations(each)

    def tables(self) -> ExpectedTables:
        """Return what is known, as the model says it."""
        living = {clerk_id: it for clerk_id, it in self._known.items() if it.deleted_at is None}
        rows = self._rows()
        return ExpectedTables(
            rows,
            {clerk_id: it.deleted_at for clerk_id, it in self._known.items() if it.deleted_at is not None},
            {
                clerk_id: it.login_at
                for clerk_id, it in living.items()
                if it.login_at is not None and clerk_id not in rows
            },
            {
                (clerk_id, it.id): Stay(*it[1:])
                for clerk_id, user in living.items()
                for it in user.memberships
            },
            {
                it.id: Company(it.name, it.version, it.deleted_at, it.slug, it.image_url)
                for it in self._organizations.values()
                if it != Organization(it.id)
            },
            {it.clerk_id: (it.source[0], it.source[1]) for it in self._known.values() if it.source},
            {
                row.clerk_id: (row.profile, to_ms(row.updated_at))
                for it in self._known.values()
                if (row := profile_row(it))
            },
        )

    def _rows(self) -> dict[str, Row]:
        claims = {it.email.address for it in self._known.values() if it.email and it.email.address}
        holders = {
            clerk_id: address
            for address, clerk_id in resolve(self._known.values(), [], frozenset(claims)).items()
        }
        found = {}
        for clerk_id, change in self._known.items():
            if wanted := target_row(change, None, holders.get(clerk_id), self._policy):
                row = wanted.row
                found[clerk_id] = Row(*row[:5], to_ms(row.created_at), maybe_ms(row.last_login_at))
        return found

    def _merge_organizations(self, received: ReceivedChange) -> None:
        change = received.change
        for fact in (change,) if isinstance(change, Organization) else change.organizations:
            known = self._organizations.get(fact.id, Organization(fact.id))
            self._organizations[fact.id] = merge_organizations(known, fact)


def comparable(found: ExpectedTables, choices: Choices) -> ExpectedTables:
    """Return the tables without the column that PostgreSQL computes, and with numbers in one form."""
    follows = choices.organization_source == "membership"
    users = {
        clerk_id: it._replace(organization=None) if follows else it for clerk_id, it in found.users.items()
    }
    profiles = {
        clerk_id: (text.replace("1e+25", "1e25").replace("1e+30", "1e30"), at)
        for clerk_id, (text, at) in found.profiles.items()
    }
    return found._replace(users=users, profiles=profiles)


@pytest.mark.timeout(3600)
def test_shuffled_histories_end_as_the_model_says() -> None:
    @settings(no_deadline, max_examples=HISTORIES, database=None)
    @given(histories(16, casts_of_members), choices_of_source, st.randoms(use_true_random=False))
    def end_the_same(deliveries: list[SentEvent], choices: Choices, random: Random) -> None:
        for plan in islice(plans(deliveries, random, workers=1), 3):
            memory = Memory(choices)
            for batch in plan.batches:
                memory.apply(batch)
            assert comparable(memory.tables(), choices) == comparable(tables(deliveries, choices), choices)

    end_the_same()
