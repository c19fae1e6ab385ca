"""`clerk-sync reconcile` and `clerk-sync pull` as an operator, or a script, runs them."""

import json
from typing import Any

import pytest

import config
from tests.support.commands import run
from tests.support.fake_clerk import FakeClerk, numbered_id
from tests.support.payloads import (
    ANN,
    BEN,
    CAT,
    NOW,
    deleted_event,
    membership,
    organization,
    user,
    user_event,
)
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, count, deliver, open_context, rows, tombstones


@pytest.fixture
def clerk(clerk: FakeClerk) -> FakeClerk:
    clerk.put_many(30)
    return clerk


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    made = api_settings(make_settings, clerk)
    with open_context(made) as both:
        deliver(both, *(user_event(data=clerk.user(clerk_id)) for clerk_id in clerk.ids()))
    return made


@pytest.fixture
def drift(clerk: FakeClerk, settings: config.Settings) -> config.Settings:
    """One of each kind: missing, stale, ghost, a claim, a tombstone."""
    clerk.put(user(ANN))
    clerk.put(user(numbered_id(3), "user3@example.com", first_name="New", updated_at=NOW))
    clerk.remove(numbered_id(4))
    with open_context(settings) as both:
        deliver(both, deleted_event(numbered_id(5)))
        deliver(both, user_event(data=user(BEN, "shared@example.com", updated_at=NOW + 500)))
        deliver(both, user_event(data=user(CAT, "shared@example.com", updated_at=NOW + 100)))
    clerk.put(user(CAT, "shared@example.com", updated_at=NOW + 100))
    clerk.put(user(BEN, "ben@example.com", updated_at=NOW + 600))
    return settings


def report(settings: config.Settings, *arguments: str, status: int = 1) -> dict[str, Any]:
    ran = run(settings, "reconcile", "--json", *arguments)
    assert ran.returncode == status, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_no_drift_is_exit_status_0(settings: config.Settings) -> None:
    ran = run(settings, "reconcile")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "30 users in Clerk, 30 here, 0 differ\n"


def test_every_kind_of_drift_is_listed_as_json(drift: config.Settings) -> None:
    found = report(drift)
    assert found["missing"] == [ANN]
    assert found["ghost"] == [numbered_id(4)]
    assert found["claims"] == [{"clerk_id": CAT, "held_by": BEN}]
    assert found["tombstone"] == [numbered_id(5)]
    assert {user["clerk_id"]: user["columns"] for user in found["stale"]} == {
        numbered_id(3): ["name", "created_at"],
        BEN: ["email"],
    }
    assert (found["refusal"], found["fixed"], found["left"]) == (None, False, None)
    assert "@" not in json.dumps(found)


def test_drift_is_listed_for_people_with_the_summary_last(drift: config.Settings) -> None:
    ran = run(drift, "reconcile")
    assert ran.returncode == 1
    assert ran.stdout.endswith("32 users in Clerk, 31 here, 6 differ\n")
    for shown in (
        ANN,
        numbered_id(3),
        "name, created_at",
        numbered_id(4),
        CAT,
        f"{BEN} has the address",
        numbered_id(5),
    ):
        assert shown in " ".join(ran.stdout.split())
    assert "@" not in ran.stdout + ran.stderr
    assert all(len(line) <= 80 for line in ran.stdout.splitlines())


def test_fix_corrects_what_can_be_corrected(drift: config.Settings, clerk: FakeClerk) -> None:
    found = report(drift, "--fix")
    assert (found["fixed"], found["left"]) == (True, [numbered_id(5)])
    assert set(rows(drift)) == set(clerk.ids()) - {numbered_id(5)}
    assert rows(drift)[CAT].email == "shared@example.com"


def test_fix_is_exit_status_0_once_all_is_fixed(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    clerk.remove(numbered_id(4))
    ran = run(settings, "reconcile", "--fix")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("All fixed\n")
    assert tombstones(settings) == {numbered_id(4)}
    assert run(settings, "reconcile").returncode == 0


def test_fix_refuses_too_many_deletions(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    clerk.remove(*(numbered_id(i) for i in range(11)))
    ran = run(settings, "reconcile", "--fix")
    assert ran.returncode == 1
    assert "Nothing was changed: 11 of 30" in ran.stderr
    assert "--allow-deletes 11" in ran.stderr
    assert count(settings) == 30
    assert "11 of 30" in report(settings, "--fix")["refusal"]
    assert run(settings, "reconcile", "--fix", "--allow-deletes", "11").returncode == 0
    assert set(rows(settings)) == set(clerk.ids())


@pytest.mark.parametrize("listed", [0, 20])
def test_fix_refuses_an_incomplete_listing(clerk: FakeClerk, settings: config.Settings, listed: int) -> None:
    clerk.put(user(ANN))
    clerk.lists_at_most = listed
    ran = run(settings, "reconcile", "--fix", "--allow-deletes", "30")
    assert ran.returncode == 1
    assert "Nothing was changed: the listing was cut short" in ran.stderr
    assert set(rows(settings)) == {numbered_id(i) for i in range(30)}


def test_pull_brings_one_user(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    ran = run(settings, "pull", ANN)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{ANN} is now the same here as in Clerk\n"
    assert ANN in rows(settings)


def test_pull_of_who_is_gone_is_a_tombstone(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.remove(numbered_id(3))
    ran = run(settings, "pull", numbered_id(3))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert numbered_id(3) not in rows(settings)
    assert tombstones(settings) == {numbered_id(3)}


def test_pull_of_who_was_deleted_here_says_so(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    with open_context(settings) as both:
        deliver(both, deleted_event(ANN))
    ran = run(settings, "pull", ANN)
    assert ran.returncode == 1
    assert "for good" in ran.stdout


def test_pull_of_what_is_no_id_is_wrong_usage(settings: config.Settings) -> None:
    assert run(settings, "pull", "user.1").returncode == 2
    typo = run(settings, "pull", "usr_1")
    assert (typo.returncode, "--yes" in typo.stderr) == (2, True)
    assert run(settings, "pull", "usr_1", "--yes").returncode == 0
    assert run(settings, "pull").returncode == 2
    assert run(settings, "reconcile", "--allow-deletes", "-1").returncode == 2
    assert run(settings, "backfill", "--since", "soon").returncode == 2


def test_memberships_are_counted_compared_and_fixed(clerk: FakeClerk, make_settings: MakeSettings) -> None:
    clerk.put_many_members(12)
    settings = api_settings(make_settings, clerk, organization_source="membership")
    assert run(settings, "backfill").stdout == (
        "30 users: 30 created, 0 updated, 0 unchanged; 12 memberships\n"
    )
    assert rows(settings)[numbered_id(3)].organization == "Firm 3"
    clerk.remove_members("orgmem_2fake00000003")
    ran = run(settings, "reconcile")
    assert ran.returncode == 1
    assert "11 memberships in Clerk, 12 here" in ran.stdout
    assert "organization" in ran.stdout
    found = report(settings)
    assert found["stale"] == [{"clerk_id": numbered_id(3), "columns": ["organization"]}]
    assert found["memberships"] == {"listed": 11, "local": 12, "ended": 1}
    assert run(settings, "reconcile", "--fix").stdout.endswith("All fixed\n")
    assert rows(settings)[numbered_id(3)].organization is None
    clerk.put_members(membership(numbered_id(20), organization(name="Acme")))
    assert run(settings, "pull", numbered_id(20)).returncode == 0
    assert rows(settings)[numbered_id(20)].organization == "Acme"
    assert run(settings, "reconcile").returncode == 0
