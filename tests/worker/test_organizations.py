"""What the events of organizations and memberships mean, one row for each rule."""

import time
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from db.merge.change import EmailClaim, Membership, Organization, Profile, UserChange, Version
from tests.support.hypothesis_settings import no_deadline
from tests.support.payloads import (
    ABSENT,
    ACME,
    ANN,
    BEN,
    NOW,
    PAYLOADS,
    Json,
    body,
    dissolved,
    membership,
    membership_event,
    organization,
    organization_event,
    payload,
    session,
    session_event,
    user,
    user_event,
)
from tests.worker.test_changes import ODD, ODD_TIMES, RECEIVED, said
from tests.worker.test_payloads import (
    BAD_IDS,
    MARK,
    anything,
    assert_clean,
    assert_understood_or_unreadable,
)
from worker.clerk.errors import Unreadable
from worker.clerk.payloads import (
    HANDLED_TYPES,
    ORGANIZATION_TYPES,
    FieldSources,
    handled_types,
    summarize,
)
from worker.runner.batch import incoming

KEYS = FieldSources(organization=None, memberships=True)
STAY = str(membership()["id"])
JOINED = NOW + 50
SENT_AT = NOW + 65  # the builders stamp an envelope 15 ms after its data's updated_at
NAMED = Version(NOW, SENT_AT)
LATEST = 253_402_214_400_000
LONG = "n" * 3000
CREATED, UPDATED, DELETED, RENAMED, CLOSED = ORGANIZATION_TYPES


def meaning(event: object, keys: FieldSources = KEYS) -> UserChange | Organization:
    """Return what one delivery says, but for roles, slugs and images."""
    return essence(whole_meaning(event, keys))


def whole_meaning(event: object, keys: FieldSources = KEYS) -> UserChange | Organization:
    return incoming("msg_1", body(event).decode(), RECEIVED, keys).change


def essence(change: UserChange | Organization) -> UserChange | Organization:
    """Return a change without roles, slugs and images."""
    if isinstance(change, Organization):
        return change._replace(slug=None, image_url=None)
    return change._replace(
        memberships=tuple(it._replace(role=None, role_version=None) for it in change.memberships),
        organizations=tuple(it._replace(slug=None, image_url=None) for it in change.organizations),
    )


def member(
    *,
    clerk_id: str = ANN,
    organization_id: str = ACME,
    id_: str = STAY,
    joined_at: int = JOINED,
    ended_at: int | None = None,
    name: str | None = "Acme",
    version: tuple[int, int] = NAMED,
) -> UserChange:
    """Return what `membership_event()` says, but for what the arguments say."""
    named = Organization(organization_id, Version(*version) if name else None, name)
    stay = Membership(id_, organization_id, joined_at, ended_at)
    return UserChange(clerk_id, memberships=(stay,), organizations=(named,))


def acme(name: str | None = "Acme", version: tuple[int, int] = (NOW, NOW + 15)) -> Organization:
    """Return what `organization_event()` says, but for what the arguments say."""
    return Organization(ACME, Version(*version) if name else None, name)


def shown(of: Json, **fields: Any) -> Json:
    """Return a membership's event that shows this organization."""
    return membership_event(data=membership(of=of), **fields)


RULES: dict[str, tuple[Json, UserChange | Organization]] = {
    "a membership that was created began at its created_at": (membership_event(), member()),
    "one that was updated says the same": (membership_event(UPDATED), member()),
    "its own updated_at says nothing": (
        membership_event(data=membership(updated_at=NOW + 900), timestamp=SENT_AT),
        member(),
    ),
    "one that was deleted ended when that happened": (
        membership_event(DELETED, timestamp=NOW + 700),
        member(ended_at=NOW + 700, version=(NOW, NOW + 700)),
    ),
    "without the envelope's timestamp it ended when that was received": (
        membership_event(DELETED, timestamp=ABSENT),
        member(ended_at=RECEIVED, version=(NOW, NOW)),
    ),
    "the envelope's timestamp may be in seconds": (
        membership_event(DELETED, timestamp=NOW // 1000),
        member(ended_at=NOW, version=(NOW, NOW)),
    ),
    "the user is the one in public_user_data": (
        membership_event(data=membership(BEN, user_id=ANN, user={"id": ANN})),
        member(clerk_id=BEN),
    ),
    "the name's version is the organization's updated_at, then the envelope's timestamp": (
        shown(organization(updated_at=NOW + 5), timestamp=NOW + 900),
        member(version=(NOW + 5, NOW + 900)),
    ),
    "without updated_at it is the envelope's timestamp": (
        shown(organization(updated_at=ABSENT), timestamp=NOW + 900),
        member(version=(NOW + 900, NOW + 900)),
    ),
    "without the envelope's timestamp it is updated_at": (
        shown(organization(updated_at=NOW + 5), timestamp=ABSENT),
        member(version=(NOW + 5, NOW + 5)),
    ),
    "without any time it is older than every other": (
        shown(organization(updated_at=None), timestamp=None),
        member(version=(0, 0)),
    ),
    "a membership without created_at began when it was seen": (
        membership_event(data=membership(created_at=ABSENT), timestamp=NOW + 900),
        member(joined_at=NOW + 900, version=(NOW, NOW + 900)),
    ),
    "without any time it began before every other": (
        membership_event(data=membership(created_at=None), timestamp=ABSENT),
        member(joined_at=0, version=(NOW, NOW)),
    ),
    "the latest time there is": (
        membership_event(DELETED, membership(created_at=LATEST), timestamp=LATEST),
        member(joined_at=LATEST, ended_at=LATEST, version=(NOW, LATEST)),
    ),
    "an organization that was updated has that name": (organization_event(), acme()),
    "one that was deleted was so when that happened": (
        organization_event(CLOSED, dissolved(), timestamp=NOW + 700),
        Organization(ACME, deleted_at=NOW + 700),
    ),
    "without a time, when that was received": (
        organization_event(CLOSED, dissolved(), timestamp=ABSENT),
        Organization(ACME, deleted_at=RECEIVED),
    ),
    "one that was deleted may still tell its name": (
        organization_event(CLOSED, organization(), timestamp=NOW + 700),
        acme(version=(NOW, NOW + 700))._replace(deleted_at=NOW + 700),
    ),
    "a name in its public metadata is none": (
        organization_event(data=organization(name=None, public_metadata={"name": "Meta"})),
        acme(None),
    ),
}


@pytest.mark.parametrize(("event", "expected"), RULES.values(), ids=RULES.keys())
def test_rules(event: Json, expected: UserChange | Organization) -> None:
    assert meaning(event) == expected


NAMES: dict[str, tuple[object, str | None]] = {
    "as sent": ("Fjord & Sønner A/S 🎈", "Fjord & Sønner A/S 🎈"),
    "with white space": ("  Acme\n", "  Acme\n"),
    "NUL goes": ("Ac\0me", "Acme"),
    "lone surrogates are replaced": ("Ac\ud800me", "Ac\ufffdme"),
    "too long is cut": (LONG, "n" * 255),
    "cut after NUL went": ("\0" + LONG, "n" * 255),
    "empty is none": ("", None),
    "only NUL is none": ("\0\0", None),
    "only white space is none": (" \t\n", None),
    "null is none": (None, None),
    "absent is none": (ABSENT, None),
    "a number is none": (5, None),
    "a list is none": (["Acme"], None),
    "an object is none": ({"name": "Acme"}, None),
}


@pytest.mark.parametrize(("sent", "name"), NAMES.values(), ids=NAMES.keys())
def test_names(sent: object, name: str | None) -> None:
    assert meaning(organization_event(data=organization(name=sent))) == acme(name)
    assert meaning(shown(organization(name=sent))) == member(name=name)


@pytest.mark.parametrize("value", ODD_TIMES, ids=lambda value: "absent" if value is ABSENT else repr(value))
def test_an_odd_time_is_none(value: object) -> None:
    unnamed = shown(organization(updated_at=value), timestamp=SENT_AT)
    assert meaning(unnamed) == member(version=(SENT_AT, SENT_AT))
    undated = membership_event(data=membership(created_at=value), timestamp=SENT_AT)
    assert meaning(undated) == member(joined_at=SENT_AT)
    ended = membership_event(DELETED, timestamp=value)
    assert meaning(ended) == member(ended_at=RECEIVED, version=(NOW, NOW))
    gone = organization_event(CLOSED, dissolved(), timestamp=value)
    assert meaning(gone) == Organization(ACME, deleted_at=RECEIVED)


@pytest.mark.parametrize("type_", ORGANIZATION_TYPES)
@pytest.mark.parametrize("value", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_a_membership_or_an_organization_without_its_ids_cannot_be_understood(
    type_: str, value: object
) -> None:
    malformed = {"data.id": organization(value, MARK)}
    if type_ not in (RENAMED, CLOSED):
        malformed = {
            "data.id": membership(id=value),
            "data.organization.id": membership(of=organization(value, MARK)),
            "data.public_user_data.user_id": membership(value),
        }
    for place, content in malformed.items():
        with pytest.raises(Unreadable, match=rf"^the event's {place} is not a Clerk id$") as refused:
            meaning(membership_event(type_, content))
        assert_clean(refused.value)


@pytest.mark.parametrize("field", ["organization", "public_user_data"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: "absent" if value is ABSENT else repr(value))
def test_a_part_of_a_membership_that_is_no_object_cannot_be_understood(field: str, value: object) -> None:
    with pytest.raises(Unreadable, match=rf"^the event's data.{field}.\w+ is not a Clerk id$"):
        meaning(membership_event(data={**membership(), field: None if value is ABSENT else value}))


def test_an_odd_field_changes_nothing_else() -> None:
    for value in ODD:
        for field in membership().keys() - {"id", "organization", "public_user_data", "created_at"}:
            data = membership(**dict[str, Any]({field: value}))
            assert meaning(membership_event(data=data, timestamp=SENT_AT)) == member()
        for field in organization().keys() - {"id", "name", "updated_at"}:
            event = organization_event(data=organization(**dict[str, Any]({field: value})))
            assert meaning(event) == acme()


def ann(memberships: object, **fields: Any) -> Json:
    """Return the JSON of a user with these `organization_memberships`."""
    return user(email=None, organization_memberships=memberships, **fields)


def ann_says(*of_members: UserChange, version: tuple[int, int] = (NOW + 20, NOW + 35)) -> UserChange:
    """Return what `ann` says, with what these say of organizations."""
    profile = Profile(Version(*version), NOW, "Marisol Okonkwo", None, "user")
    return UserChange(
        ANN,
        profile,
        EmailClaim(Version(*version), None),
        memberships=tuple(stay for change in of_members for stay in change.memberships),
        organizations=tuple(named for change in of_members for named in change.organizations),
    )


IN_USER = (NOW, NOW + 35)  # the version of a name that a user's JSON tells


def test_a_users_json_tells_memberships() -> None:
    entries = [membership(id="orgmem_b", of=organization("org_a")), membership(id="orgmem_a")]
    expected = [member(id_="orgmem_a", version=IN_USER), member(id_="orgmem_b", organization_id="org_a")]
    event = user_event(data=ann(entries))
    found = essence(said(event, keys=KEYS))
    assert isinstance(found, UserChange)
    assert found.memberships == (expected[0].memberships[0], expected[1].memberships[0])
    assert [named.id for named in found.organizations] == sorted([ACME, "org_a"])
    assert meaning(user_event("user.updated", ann([membership()]))) == ann_says(member(version=IN_USER))


def test_whose_they_are_is_said_around_them() -> None:
    for odd in (ABSENT, None, {"user_id": BEN}):
        entry = membership(public_user_data=odd)
        assert meaning(user_event(data=ann([entry]))) == ann_says(member(version=IN_USER))


def test_of_one_membership_shown_twice_the_later_beginning_counts_in_either_order() -> None:
    entries = [membership(), membership(created_at=NOW + 60, of=organization(name="New", updated_at=NOW + 1))]
    for order in permutations(entries):
        found = meaning(user_event(data=ann(list(order))))
        assert found == ann_says(member(joined_at=NOW + 60, name="New", version=(NOW + 1, NOW + 35)))


def test_without_the_envelopes_timestamp_they_were_seen_when_the_user_was_updated() -> None:
    entry = membership(created_at=None, of=organization(updated_at=None))
    expected = member(joined_at=NOW + 20, version=(NOW + 20, NOW + 20))
    found = meaning(user_event(data=ann([entry]), timestamp=ABSENT))
    assert found == ann_says(expected, version=(NOW + 20, NOW + 20))


@pytest.mark.parametrize("value", ODD, ids=lambda value: "absent" if value is ABSENT else repr(value))
def test_odd_memberships_lose_no_user_and_no_other_membership(value: object) -> None:
    assert meaning(user_event(data=ann(value))) == ann_says()
    odd = None if value is ABSENT else value
    entries: list[object] = [odd, {**membership(), "organization": odd}]
    if odd != "text":  # which might be an id
        entries += [membership(id=odd), membership(of=organization(odd))]
    event = user_event(data=ann([*entries, membership(), *entries]))
    assert meaning(event) == ann_says(member(version=IN_USER))


def test_a_sessions_user_tells_them_too() -> None:
    event = session_event(data=session(user=ann([membership()])), timestamp=NOW + 35)
    assert meaning(event) == ann_says(member(version=IN_USER))._replace(login_at=NOW)
    other = session_event(data=session(user=user(BEN, organization_memberships=[membership(BEN)])))
    assert meaning(other) == UserChange(ANN, login_at=NOW)


def test_where_membership_does_not_decide_a_users_json_tells_none() -> None:
    for keys in (FieldSources(), FieldSources(organization=None)):
        assert meaning(user_event(data=ann([membership()])), keys) == ann_says()


def test_where_membership_decides_metadata_tells_no_organization() -> None:
    data = ann([], public_metadata={"role": "admin", "organization": "Meta"})
    profile = said(user_event(data=data), keys=KEYS).profile
    assert profile is not None
    assert (profile.role, profile.organization) == ("admin", None)


def test_a_body_full_of_memberships_takes_no_more_than_its_size() -> None:
    entries = [{"id": f"m{i}", "organization": {"id": f"o{i}"}} for i in range(20_000)]
    event = user_event(data=ann(entries))
    began = time.perf_counter()
    change = said(event, keys=KEYS)
    assert time.perf_counter() - began < 10
    assert len(change.memberships) == len(change.organizations) == 20_000


@pytest.mark.parametrize(
    ("source", "types"),
    [
        ("metadata", HANDLED_TYPES),
        ("none", HANDLED_TYPES),
        ("membership", (*HANDLED_TYPES, *ORGANIZATION_TYPES)),
    ],
)
def test_the_source_says_which_types_are_handled(source: str, types: tuple[str, ...]) -> None:
    settings = config.load(_env_file=None, organization_source=source)
    assert handled_types(settings) == types
    assert FieldSources.of(settings) == FieldSources(
        organization="organization" if source == "metadata" else None, memberships=source == "membership"
    )


@pytest.mark.parametrize("type_", ORGANIZATION_TYPES)
def test_a_summary_names_the_user_or_the_organization(type_: str) -> None:
    everything = (*HANDLED_TYPES, *ORGANIZATION_TYPES)
    data, subject = (organization(), ACME) if type_ in (RENAMED, CLOSED) else (membership(), ANN)
    event = membership_event(type_, data)
    assert summarize(event, everything) == (type_, False, subject, event["instance_id"])
    assert summarize(event, HANDLED_TYPES) == (type_, True, None, event["instance_id"])
    for odd in ODD:
        malformed = {**event, "data": None if odd is ABSENT else odd}
        assert summarize(malformed, everything) == (type_, False, None, event["instance_id"])


@pytest.mark.parametrize("value", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_a_summary_never_holds_what_is_no_id(value: object) -> None:
    for event in (membership_event(data=membership(value)), organization_event(data=organization(value))):
        assert summarize(event, ORGANIZATION_TYPES).clerk_id is None


MARISOL = "user_36F9wJ2xNcVb6sQeLhG0pTrKyZa"
FJORD = "org_36M2qYdKcVb8TzNxWs5LhRpGuJe"


def marisol(name: str, version: tuple[int, int], ended_at: int | None = None) -> UserChange:
    return member(
        clerk_id=MARISOL,
        organization_id=FJORD,
        id_="orgmem_36M4tHsXbLq0VnZcRw7KpYdGuEa",
        joined_at=1764935117204,
        ended_at=ended_at,
        name=name,
        version=version,
    )


FIXTURES: dict[str, UserChange | Organization] = {
    CREATED: marisol("Fjord & Sønner A/S", (1764931402618, 1764935117241)),
    UPDATED: marisol("Fjord & Sønner A/S", (1764931402618, 1764999630029)),
    DELETED: marisol("Fjord og Døtre A/S", (1765011208330, 1765098007712), 1765098007712),
    RENAMED: Organization(FJORD, Version(1765011208330, 1765011208347), "Fjord og Døtre A/S"),
    CLOSED: Organization(FJORD, deleted_at=1765184400903),
}


def test_every_fixture_of_organizations_has_its_meaning_here() -> None:
    assert {path.stem for path in (PAYLOADS / "organizations").glob("*.json")} == FIXTURES.keys()


@pytest.mark.parametrize("type_", ORGANIZATION_TYPES)
def test_a_delivery_becomes_what_is_applied(type_: str) -> None:
    event = payload(f"organizations/{type_}")
    found = incoming("msg_1", body(event).decode(), RECEIVED, KEYS)
    assert found.subject == (FJORD if type_ in (RENAMED, CLOSED) else MARISOL)
    assert (essence(found.change), *found[1:5]) == (
        FIXTURES[type_],
        "msg_1",
        type_,
        event["timestamp"],
        RECEIVED,
    )
    assert found.instance_id == event["instance_id"]


def test_what_several_say_of_one_user_merges() -> None:
    late = membership_event(DELETED, timestamp=NOW + 700)
    later = membership_event(DELETED, timestamp=NOW + 900)
    for order in permutations([membership_event(), late, later]):
        assert essence(said(*order, keys=KEYS)) == member(ended_at=NOW + 700, version=(NOW, NOW + 900))


@no_deadline
@given(st.lists(anything, max_size=4))
def test_any_memberships_of_a_user_are_understood(entries: list[object]) -> None:
    assert_understood_or_unreadable(body(user_event(data=ann([*entries, membership()]))).decode())


def test_a_role_has_the_version_of_its_membership() -> None:
    event = membership_event(UPDATED, membership(role="org:admin", updated_at=NOW + 90), timestamp=NOW + 95)
    (stay,) = said(event, keys=KEYS).memberships
    assert (stay.role, stay.role_version) == ("org:admin", Version(NOW + 90, NOW + 95))


@pytest.mark.parametrize("role", [None, ABSENT, "", "\0", 5, [], {}])
def test_an_odd_role_says_nothing(role: Any) -> None:
    (stay,) = said(membership_event(data=membership(role=role)), keys=KEYS).memberships
    assert (stay.role, stay.role_version) == (None, None)


def test_slug_and_image_travel_with_the_name() -> None:
    image = "https://img.clerk.com/" + "a" * 600
    change = whole_meaning(organization_event(data=organization(slug="acme\0", image_url=image)))
    assert change == Organization(ACME, Version(NOW, NOW + 15), "Acme", slug="acme", image_url=image)
