"""The laws of `merge`, over values so few that ties and equal values are frequent."""

from functools import reduce
from itertools import permutations
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.merge.change import EmailClaim, Membership, Organization, Profile, UserChange, Version, merge
from tests.support.hypothesis_settings import no_deadline

few_times = st.integers(0, 2)
versions = st.builds(Version, few_times, few_times)
# "B" < "a" < "b" by code point, and U+FFFD < U+1F600 although UTF-16 orders them the other way.
names = st.sampled_from(["", "B", "a", "\ufffd", "\U0001f600"])
profiles = st.builds(
    Profile,
    version=versions,
    created_at=few_times,
    name=names,
    organization=st.none() | names,
    role=st.sampled_from(["admin", "user"]),
)
claims = st.builds(EmailClaim, versions, st.sampled_from([None, "B@example.com", "a@example.com"]))
few_ids = st.sampled_from(["a", "b"])
maybe_times = st.none() | few_times
organizations = st.builds(Organization, few_ids, st.none() | versions, st.none() | names, maybe_times)
memberships = st.builds(Membership, few_ids, few_ids, few_times, maybe_times)


def ordered(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw tuples ordered by id, no id twice, as changes hold them."""
    lists = st.lists(strategy, unique_by=lambda item: item.id, max_size=2)
    return lists.map(lambda items: tuple(sorted(items, key=lambda item: item.id)))


changes = st.builds(
    UserChange,
    st.just("user_a"),
    st.none() | profiles,
    st.none() | claims,
    st.none() | few_times,
    st.none() | few_times,
    ordered(memberships),
    ordered(organizations),
)

OLD, NEW = Version(1, 9), Version(2, 0)


@no_deadline
@given(changes, changes, changes)
def test_merge_is_associative(a: UserChange, b: UserChange, c: UserChange) -> None:
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@no_deadline
@given(changes, changes)
def test_merge_is_commutative(a: UserChange, b: UserChange) -> None:
    assert merge(a, b) == merge(b, a)


@no_deadline
@given(changes, changes)
def test_merge_is_idempotent(a: UserChange, b: UserChange) -> None:
    merged = merge(a, b)
    assert merge(a, a) == a
    assert merge(merged, a) == merge(merged, b) == merge(merged, merged) == merged


@no_deadline
@given(changes)
def test_a_change_that_says_nothing_changes_nothing(a: UserChange) -> None:
    assert merge(a, UserChange("user_a")) == a


@no_deadline
@given(st.lists(changes, min_size=1, max_size=6), st.randoms(use_true_random=False), st.data())
def test_changes_merge_to_the_same_in_any_order_repetition_and_grouping(
    said: list[UserChange], random: Random, data: st.DataObject
) -> None:
    again = [*said, *data.draw(st.lists(st.sampled_from(said), max_size=4))]
    random.shuffle(again)
    middle = data.draw(st.integers(0, len(again)))
    groups = [group for group in (again[:middle], again[middle:]) if group]
    assert reduce(merge, [reduce(merge, group) for group in groups]) == reduce(merge, said)


@no_deadline
@given(changes, changes)
def test_each_part_is_taken_whole_from_one_of_the_two(a: UserChange, b: UserChange) -> None:
    merged = merge(a, b)
    for part in ("profile", "email", "login_at", "deleted_at"):
        said = [value for value in (getattr(a, part), getattr(b, part)) if value is not None]
        assert getattr(merged, part) in said or (getattr(merged, part) is None and not said)


@no_deadline
@given(changes, changes)
def test_the_greater_version_wins_whatever_it_says(a: UserChange, b: UserChange) -> None:
    merged = merge(a, b)
    for part in ("profile", "email"):
        said = [value for value in (getattr(a, part), getattr(b, part)) if value is not None]
        if said:
            assert getattr(merged, part).version == max(value.version for value in said)


@no_deadline
@given(changes, changes)
def test_the_later_login_and_the_earlier_deletion_stay(a: UserChange, b: UserChange) -> None:
    merged = merge(a, b)
    assert merged.login_at == max((t for t in (a.login_at, b.login_at) if t is not None), default=None)
    assert merged.deleted_at == min((t for t in (a.deleted_at, b.deleted_at) if t is not None), default=None)


def a_profile(
    version: Version = NEW,
    created_at: int = 1,
    name: str = "a",
    organization: str | None = "a",
    role: str = "user",
) -> UserChange:
    return UserChange("user_a", Profile(version, created_at, name, organization, role))


def a_claim(version: Version, address: str | None) -> UserChange:
    return UserChange("user_a", email=EmailClaim(version, address))


@pytest.mark.parametrize(
    ("changes", "winner"),
    [
        pytest.param([a_profile(OLD, 9, "z"), a_profile(NEW)], a_profile(NEW), id="updated_at stands first"),
        pytest.param(
            [a_profile(Version(2, 1)), a_profile(NEW, 9, "z")],
            a_profile(Version(2, 1)),
            id="then when it was observed",
        ),
        pytest.param(
            [a_profile(created_at=1, name="z"), a_profile(created_at=2)],
            a_profile(created_at=2),
            id="a tie falls to the later created_at",
        ),
        pytest.param(
            [a_profile(name="B"), a_profile(name="a", organization=None)],
            a_profile(name="a", organization=None),
            id="then to the greater name, by code point",
        ),
        pytest.param(
            [a_profile(name="\ufffd", organization="z"), a_profile(name="\U0001f600")],
            a_profile(name="\U0001f600"),
            id="by code point beyond the basic plane too",
        ),
        pytest.param(
            [a_profile(organization=None, role="user"), a_profile(organization="", role="admin")],
            a_profile(organization="", role="admin"),
            id="then to the greater organization, none being the least",
        ),
        pytest.param([a_profile(role="admin"), a_profile(role="user")], a_profile(), id="then to the role"),
        pytest.param(
            [a_claim(OLD, "z@example.com"), a_claim(NEW, None)],
            a_claim(NEW, None),
            id="a newer claim on nothing lets the address go",
        ),
        pytest.param(
            [a_claim(NEW, None), a_claim(NEW, "B@example.com"), a_claim(NEW, "a@example.com")],
            a_claim(NEW, "a@example.com"),
            id="a tie of claims falls to the greater address, none being the least",
        ),
        pytest.param(
            [a_profile(NEW), a_claim(OLD, "a@example.com")],
            UserChange(
                "user_a", Profile(NEW, 1, "a", "a", "user"), EmailClaim(OLD, "a@example.com"), None, None
            ),
            id="the claim has a version of its own",
        ),
        pytest.param(
            [a_profile(NEW), UserChange("user_a", deleted_at=5), UserChange("user_a", deleted_at=3)],
            UserChange("user_a", Profile(NEW, 1, "a", "a", "user"), deleted_at=3),
            id="deleted stays deleted, since the earliest time",
        ),
        pytest.param(
            [UserChange("user_a", login_at=0), UserChange("user_a")],
            UserChange("user_a", login_at=0),
            id="the epoch itself is a time",
        ),
    ],
)
def test_what_wins_a_merge(changes: list[UserChange], winner: UserChange) -> None:
    for order in permutations(changes):
        assert reduce(merge, order) == winner


def test_changes_of_two_users_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="two users"):
        merge(UserChange("user_a"), UserChange("user_b"))
