"""What an event means, one row for each rule: deliveries in, what they say about the user out."""

import re
import unicodedata
from functools import reduce
from itertools import permutations
from typing import Any

import pytest

from db.merge.change import EmailClaim, Profile, UserChange, Version, merge
from tests.support.payloads import (
    ABSENT,
    ANN,
    BEN,
    NOW,
    PAYLOADS,
    Json,
    body,
    deleted_event,
    email_entry,
    email_id,
    payload,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.storable import assert_storable
from worker.clerk.changes import INVISIBLE, change_of
from worker.clerk.errors import Unreadable
from worker.clerk.payloads import FieldSources, parse

RECEIVED = NOW + 90_000
KEYS = FieldSources()
ADDRESS = f"{ANN}@example.com"
ODD: list[object] = [
    None,
    ABSENT,
    "",
    "text",
    "\0",
    True,
    False,
    -1,
    10**30,
    1e30,
    0.5,
    [],
    [[]],
    {},
    {"a": 1},
]
DIGITS = "a number of 6,000 digits"
ODD_TIMES: list[object] = [None, ABSENT, "", "soon", "1767261600000", True, False, -1, 10**30, 1e30, [], {}]
ODD_TIMES += [DIGITS, f"-{DIGITS}"]
LONG = "n" * 3000

Deliveries = Json | list[Json]
Rules = dict[str, tuple[Deliveries, UserChange]]


def said(*events: object, keys: FieldSources = KEYS) -> UserChange:
    """Return what those deliveries say together."""
    return reduce(merge, (change(event, keys) for event in events))


def change(event: object, keys: FieldSources = KEYS, received_at: int = RECEIVED) -> UserChange:
    change = change_of(parse(text_of(event), keys), received_at)
    assert isinstance(change, UserChange)
    return change


def text_of(event: object) -> str:
    """Return the body of `event`, with a number that Python itself refuses to write where it holds DIGITS."""
    return re.sub(f'"(-?){DIGITS}"', rf"\g<1>{'9' * 6000}", body(event).decode())


def ann(
    *,
    version: tuple[int, int] = (NOW + 20, NOW + 35),
    created_at: int = NOW,
    name: str = "Marisol Okonkwo",
    organization: str | None = None,
    role: str = "user",
    email: tuple[str | None, tuple[int, int]] | str | None = ADDRESS,
    email_known: bool = True,
    verified: bool = True,
    login_at: int | None = None,
    deleted_at: int | None = None,
) -> UserChange:
    """Return what `user_event()` says, but for what the arguments say; `email` with a version or without."""
    address, claimed = (email, version) if email is None or isinstance(email, str) else email
    return UserChange(
        ANN,
        Profile(Version(*version), created_at, name, organization, role),
        EmailClaim(Version(*claimed), address, verified and address is not None) if email_known else None,
        login_at,
        deleted_at,
    )


def nothing(*, login_at: int | None = None, deleted_at: int | None = None) -> UserChange:
    """Return a change without profile and address."""
    return UserChange(ANN, login_at=login_at, deleted_at=deleted_at)


def named(first: object, last: object, username: object = None, **fields: Any) -> Json:
    """Return user.created of a user with these names."""
    return user_event(data=user(first_name=first, last_name=last, username=username, **fields))


def metadata(public: object, **fields: Any) -> Json:
    """Return user.created of a user with this public metadata."""
    return user_event(data=user(public_metadata=public, **fields))


def addresses(*entries: object, primary: object = None, **fields: Any) -> Json:
    """Return user.created of a user with these entries of `email_addresses`."""
    data = user(email_addresses=list(entries), primary_email_address_id=primary, **fields)
    return user_event(data=data)


def signed_in(created_at: object = NOW, *, type_: str = "session.created", **fields: Any) -> Json:
    """Return an event of a session that began then."""
    return session_event(type_, session(created_at=created_at, **fields))


def entry(email: object, verification: object = ..., **fields: Any) -> Json:
    """Return an entry of `email_addresses`, verified or with that verification."""
    if verification is not ...:
        fields["verification"] = verification
    return email_entry(email, **fields)


VERSIONS: Rules = {
    "the version of a profile is data.updated_at, then the envelope's timestamp": (
        user_event(timestamp=NOW + 500),
        ann(version=(NOW + 20, NOW + 500)),
    ),
    "a body without the envelope's timestamp was observed at updated_at": (
        user_event(timestamp=ABSENT),
        ann(version=(NOW + 20, NOW + 20)),
    ),
    "a timestamp below 1e11 is in seconds": (user_event(timestamp=NOW // 1000), ann(version=(NOW + 20, NOW))),
    "the last timestamp in seconds": (
        user_event(timestamp=99_999_999_999),
        ann(version=(NOW + 20, 99_999_999_999_000)),
    ),
    "the first timestamp in ms": (
        user_event(timestamp=100_000_000_000),
        ann(version=(NOW + 20, 100_000_000_000)),
    ),
    "updated_at stands before the time of observation": (
        [
            user_event(data=user(updated_at=NOW + 2, first_name="New"), timestamp=NOW + 3),
            user_event(data=user(updated_at=NOW + 1, first_name="Old"), timestamp=NOW + 9),
        ],
        ann(version=(NOW + 2, NOW + 3), name="New Okonkwo"),
    ),
    "with the same updated_at the later observation wins": (
        [
            user_event(data=user(first_name="New"), timestamp=NOW + 4),
            user_event(data=user(first_name="Old"), timestamp=NOW + 3),
        ],
        ann(version=(NOW + 20, NOW + 4), name="New Okonkwo"),
    ),
    "a tie falls to the later created_at": (
        [user_event(data=user(created_at=NOW + 1)), user_event(data=user(first_name="Z"))],
        ann(created_at=NOW + 1),
    ),
    "a tie falls to the greater name": ([named("B", None), named("a", None)], ann(name="a")),
    "a tie falls to the greater organization, none being the least": (
        [metadata({}), metadata({"organization": "B"}), metadata({"organization": "a"})],
        ann(organization="a"),
    ),
    "a tie falls to the greater role": ([metadata({"role": "admin"}), metadata({})], ann(role="user")),
    "a tie of claims falls to the greater address": (
        [user_event(data=user(email=a)) for a in (None, "B@example.com", "a@example.com")],
        ann(email="a@example.com"),
    ),
    "a tie is compared as it would be stored: what is cut off decides nothing": (
        [named("n" * 255 + "z", None), named("n" * 255 + "a", None, public_metadata={"organization": "a"})],
        ann(name="n" * 255, organization="a"),
    ),
    "a tie is compared as it would be stored: NUL decides nothing": (
        [named("An\0n", None, public_metadata={"organization": "a"}), named("Ann", None)],
        ann(name="Ann", organization="a"),
    ),
}

TYPES: Rules = {
    "user.created is the profile": (user_event("user.created"), ann()),
    "user.updated is the profile": (user_event("user.updated"), ann()),
    "user.deleted is a tombstone": (deleted_event(ANN, timestamp=NOW + 7), nothing(deleted_at=NOW + 7)),
    "a deletion in seconds": (deleted_event(ANN, timestamp=NOW // 1000), nothing(deleted_at=NOW)),
    "a deletion that does not say when happened when it was received": (
        deleted_event(ANN, timestamp=ABSENT),
        nothing(deleted_at=RECEIVED),
    ),
    "a tombstone stands whatever comes before and after": (
        [
            user_event(),
            deleted_event(ANN),
            user_event("user.updated", user(updated_at=NOW + 99), timestamp=NOW),
        ],
        ann(version=(NOW + 99, NOW), deleted_at=NOW),
    ),
    "the tombstone's time is the earliest seen": (
        [deleted_event(ANN, timestamp=NOW + 9), deleted_event(ANN, timestamp=NOW + 3)],
        nothing(deleted_at=NOW + 3),
    ),
}

SIGN_INS: Rules = {
    f"{type_}: the session's created_at is a sign-in": (
        signed_in(NOW + 4, type_=type_),
        nothing(login_at=NOW + 4),
    )
    for type_ in ("session.created", "session.pending", "session.ended", "session.removed", "session.revoked")
}

SESSIONS: Rules = {
    "the latest sign-in stays": (
        [
            signed_in(NOW + 5),
            signed_in(NOW + 2, type_="session.revoked", updated_at=NOW + 900),
            signed_in(NOW + 4),
        ],
        nothing(login_at=NOW + 5),
    ),
    "an impersonated session is no login": (
        [
            signed_in(NOW + 5, actor={"sub": "user_staff", "iss": "https://dashboard.clerk.com"}),
            signed_in(NOW + 2),
        ],
        nothing(login_at=NOW + 2),
    ),
    "an actor that says nothing of himself is one": (
        [signed_in(NOW + 5, actor={}), signed_in(1)],
        nothing(login_at=1),
    ),
    "actor null is no actor": (signed_in(NOW + 5, actor=None), nothing(login_at=NOW + 5)),
    "actor absent is no actor": (signed_in(NOW + 5, actor=ABSENT), nothing(login_at=NOW + 5)),
    "the user in a session is a profile, observed at the envelope's timestamp": (
        session_event(data=session(user=user()), timestamp=NOW + 77),
        ann(version=(NOW + 20, NOW + 77), login_at=NOW),
    ),
    "without that timestamp observed at the session's updated_at": (
        session_event(data=session(user=user(), updated_at=NOW + 66), timestamp=ABSENT),
        ann(version=(NOW + 20, NOW + 66), login_at=NOW),
    ),
    "without both observed at the user's updated_at": (
        session_event(data=session(user=user(), updated_at=None), timestamp=None),
        ann(version=(NOW + 20, NOW + 20), login_at=NOW),
    ),
    "the user in a session may be older than what is known": (
        [
            user_event("user.updated", user(updated_at=NOW + 50, first_name="New"), timestamp=NOW + 51),
            signed_in(NOW + 60, updated_at=NOW + 61, user=user(first_name="Old", email="old@example.com")),
        ],
        ann(version=(NOW + 50, NOW + 51), name="New Okonkwo", login_at=NOW + 60),
    ),
    "the user in a session is no profile when it is another one": (
        signed_in(NOW, user=user(BEN, last_sign_in_at=NOW + 5)),
        nothing(login_at=NOW),
    ),
    "the user in a session is no profile when it has no id": (
        signed_in(NOW, user=user(ABSENT, last_sign_in_at=NOW + 5)),
        nothing(login_at=NOW),
    ),
    "the user in an impersonated session is a profile": (
        session_event(data=session(user=user(), actor={"sub": "user_staff"}), timestamp=NOW + 35),
        ann(),
    ),
    "a session that does not say when it began still brings its user": (
        session_event(data=session(user=user(), created_at=None), timestamp=NOW + 35),
        ann(),
    ),
    "the user in a session after the deletion brings nothing back": (
        [deleted_event(ANN), session_event(data=session(user=user()), timestamp=NOW + 35)],
        ann(login_at=NOW, deleted_at=NOW),
    ),
    "a profile's last_sign_in_at is a login": (
        user_event(data=user(last_sign_in_at=NOW + 3)),
        ann(login_at=NOW + 3),
    ),
    "a stale profile's last_sign_in_at is a login": (
        [user_event(data=user(last_sign_in_at=NOW + 3)), user_event(data=user(updated_at=NOW + 21))],
        ann(version=(NOW + 21, NOW + 36), login_at=NOW + 3),
    ),
    "the last_sign_in_at of the user in a session is a login": (
        session_event(data=session(user=user(last_sign_in_at=NOW + 3)), timestamp=NOW + 35),
        ann(login_at=NOW + 3),
    ),
    "a session may be later than its user's last_sign_in_at": (
        session_event(
            data=session(created_at=NOW + 4, user=user(last_sign_in_at=NOW + 3)), timestamp=NOW + 35
        ),
        ann(login_at=NOW + 4),
    ),
}

TWO = [entry("first@example.com"), entry("second@example.com")]
EMAILS: Rules = {
    "the address is the one that the primary id points to, not the first": (
        addresses(*TWO, primary=email_id("second@example.com")),
        ann(email="second@example.com"),
    ),
    "the primary address need not be verified": (
        addresses(entry("a@example.com"), entry("b@example.com", None), primary=email_id("b@example.com")),
        ann(email="b@example.com", verified=False),
    ),
    "no primary id: the first verified address": (
        addresses(
            entry("a@example.com", None),
            entry("b@example.com", {"status": "unverified", "strategy": "email_code"}),
            entry("c@example.com"),
            entry("d@example.com"),
        ),
        ann(email="c@example.com"),
    ),
    "an absent primary id is no primary id": (
        addresses(*TWO, primary=ABSENT),
        ann(email="first@example.com"),
    ),
    "no primary id, none verified: no address": (
        addresses(entry("a@example.com", None), entry("b@example.com", {"status": "expired"})),
        ann(email=None),
    ),
    "no primary id, no addresses: no address": (addresses(), ann(email=None)),
    "no primary id: an entry without a text is no address": (
        addresses(entry(None, {"status": "verified"}), entry("b@example.com")),
        ann(email="b@example.com"),
    ),
    "a primary id that is not in the list says nothing about the address": (
        addresses(*TWO, primary="idn_36Kd4UzEoNf5WpKjXi7BtMqDvSy"),
        ann(email_known=False),
    ),
    "a primary id beside an empty list says nothing about the address": (
        addresses(primary="idn_36Kd4UzEoNf5WpKjXi7BtMqDvSy"),
        ann(email_known=False),
    ),
    "what is known of the address stays, in its own version": (
        [
            user_event(),
            user_event("user.updated", user(updated_at=NOW + 80, email_addresses=[], first_name="Newer")),
        ],
        ann(version=(NOW + 80, NOW + 95), name="Newer Okonkwo", email=(ADDRESS, (NOW + 20, NOW + 35))),
    ),
    "a newer user without an address lets the old one go": (
        [user_event(), user_event(data=user(email=None, updated_at=NOW + 80))],
        ann(version=(NOW + 80, NOW + 95), email=None),
    ),
    "an address with an apostrophe is one": (
        user_event(data=user(email="o'b@example.com")),
        ann(email="o'b@example.com"),
    ),
    "an international address is one": (
        user_event(data=user(email="zoë@münchen.example")),
        ann(email="zoë@münchen.example"),
    ),
    "an address keeps its case": (
        user_event(data=user(email="Ann@Example.COM")),
        ann(email="Ann@Example.COM"),
    ),
    "an address of 255 characters is stored": (
        user_event(data=user(email="a" * 243 + "@example.com")),
        ann(email="a" * 243 + "@example.com"),
    ),
    "a longer one is not stored, and not cut": (
        user_event(data=user(email="a" * 244 + "@example.com")),
        ann(email=None),
    ),
    "what is no address is not stored": (user_event(data=user(email="ann at example.com")), ann(email=None)),
    "an empty address is not stored": (user_event(data=user(email="")), ann(email=None)),
    "no user claims an address at placeholder.invalid": (
        user_event(data=user(email=f"{BEN}@placeholder.invalid")),
        ann(email=None),
    ),
    "nor in capitals": (user_event(data=user(email=f"{BEN}@Placeholder.INVALID")), ann(email=None)),
}

NAMES: Rules = {
    "first and last name are joined": (named("Ann", "Lee"), ann(name="Ann Lee")),
    "a first name alone": (named("Ann", None), ann(name="Ann")),
    "a last name alone": (named("", "Lee"), ann(name="Lee")),
    "names stand before the username": (named("Ann", None, "lee"), ann(name="Ann")),
    "else the username": (named(None, "", "ann_lee"), ann(name="ann_lee")),
    "else the part of the address before the @": (
        named("", None, "", email="lee@example.com"),
        ann(name="lee", email="lee@example.com"),
    ),
    "also of an address that cannot be stored": (
        named(None, None, email="lee@placeholder.invalid"),
        ann(name="lee", email=None),
    ),
    "a name that cannot be seen is none": (named("\u200b\u3164", "\u2800 ", "\ufeff"), ann(name=ANN)),
    "a name that can be seen stays as it is": (named("\u200bAnn", None), ann(name="\u200bAnn")),
    "else Unnamed user": (named(None, None, email=None), ann(name="Unnamed user", email=None)),
    "absent names are no names": (
        named(ABSENT, ABSENT, ABSENT, email=None),
        ann(name="Unnamed user", email=None),
    ),
    "an address that is not in this payload gives no name": (
        [user_event(), named(None, None, email_addresses=[], updated_at=NOW + 80)],
        ann(version=(NOW + 80, NOW + 95), name="Unnamed user", email=(ADDRESS, (NOW + 20, NOW + 35))),
    ),
    "an address other than the primary one gives no name": (
        addresses(*TWO, primary="idn_unlisted", first_name=None, last_name=None),
        ann(name="Unnamed user", email_known=False),
    ),
    "an odd name is no name": (named(["Ann"], 5, {"a": 1}, email=None), ann(name="Unnamed user", email=None)),
    "a name is stored as sent": (named("  <b>Ann</b> ", "d'Örß 😀"), ann(name="  <b>Ann</b>  d'Örß 😀")),
    "NUL goes": (named("An\0n", "\0Lee\0"), ann(name="Ann Lee")),
    "a name of NUL alone is no name": (named("\0", "\0\0", "\0ann"), ann(name="ann")),
    "a lone surrogate becomes U+FFFD": (named("An\ud83d", "\ude00Lee"), ann(name="An\ufffd \ufffdLee")),
    "a name is cut at 255 characters": (named(LONG, LONG), ann(name="n" * 255)),
    "first and last name are cut once joined": (
        named("a" * 200, "b" * 200),
        ann(name="a" * 200 + " " + "b" * 54),
    ),
    "characters are counted, not bytes": (named("😀" * 300, None), ann(name="😀" * 255)),
    "NUL is not counted": (named("\0" * 300 + "a" * 254 + "\0bc", None), ann(name="a" * 254 + "b")),
    "a username is cut": (named(None, None, LONG), ann(name="n" * 255)),
    "the part before the @ is cut": (
        named(None, None, email=LONG + "@example.com"),
        ann(name="n" * 255, email=None),
    ),
}

METADATA: Rules = {
    "role and organization come from public metadata": (
        metadata({"role": "admin", "organization": "Fjord & Sønner"}),
        ann(role="admin", organization="Fjord & Sønner"),
    ),
    "never from unsafe or private metadata": (
        metadata(
            {},
            unsafe_metadata={"role": "admin", "organization": "X"},
            private_metadata={"role": "admin", "organization": "X"},
        ),
        ann(),
    ),
    "nor from the user itself": (user_event(data=user(role="admin", organization="X")), ann()),
    "a role other than admin or user is user": (metadata({"role": "owner"}), ann()),
    "roles are compared as they are written": (metadata({"role": "Admin"}), ann()),
    "a role that only resembles admin is user": (metadata({"role": "admin "}), ann()),
    "an odd role is user": (metadata({"role": ["admin"], "organization": {"name": "X"}}), ann()),
    "NUL goes from an organization": (
        metadata({"organization": "Fj\0ord\udc00"}),
        ann(organization="Fjord\ufffd"),
    ),
    "an organization is cut at 255 characters": (
        metadata({"organization": "o" * 3000}),
        ann(organization="o" * 255),
    ),
    "NUL and lone surrogates anywhere else lose nothing": (
        metadata({"\0": "\ud800", "role": "admin", "deep": ["\0", {"\udfff": None}]}),
        ann(role="admin"),
    ),
    "a number of 6,000 digits in metadata loses nothing": (
        metadata({"role": "admin", "n": DIGITS, "m": [DIGITS]}, last_sign_in_at=DIGITS),
        ann(role="admin"),
    ),
}

IDS: Rules = {
    "an id of 200 characters is one": (deleted_event("a" * 200), UserChange("a" * 200, deleted_at=NOW)),
    "an id of one character is one": (deleted_event("-"), UserChange("-", deleted_at=NOW)),
    "an id with every character it may hold": (
        deleted_event("user_AZaz09-_"),
        UserChange("user_AZaz09-_", deleted_at=NOW),
    ),
}

RULES = VERSIONS | TYPES | SIGN_INS | SESSIONS | EMAILS | NAMES | METADATA | IDS


@pytest.mark.parametrize(("deliveries", "meaning"), RULES.values(), ids=RULES.keys())
def test_rule(deliveries: Deliveries, meaning: UserChange) -> None:
    events = deliveries if isinstance(deliveries, list) else [deliveries]
    for order in permutations(events):
        assert said(*order) == meaning
        assert said(*order, *events) == meaning


@pytest.mark.parametrize(
    ("keys", "role", "organization"),
    [
        (FieldSources("level", "company"), "admin", "Own"),
        (FieldSources(None, "organization"), "user", "Other"),
        (FieldSources("role", None), "user", None),
        (FieldSources(None, None), "user", None),
    ],
    ids=["other keys", "the application owns role", "the application owns organization", "it owns both"],
)
def test_the_settings_name_the_metadata_keys(keys: FieldSources, role: str, organization: str | None) -> None:
    public = {"role": "owner", "organization": "Other", "level": "admin", "company": "Own"}
    assert said(metadata(public), keys=keys) == ann(role=role, organization=organization)


def test_when_a_delivery_was_received_orders_no_profile() -> None:
    assert change(user_event(), received_at=0) == change(user_event(), received_at=RECEIVED) == ann()


@pytest.mark.parametrize("value", ODD_TIMES, ids=repr)
def test_an_odd_time_counts_as_none(value: Any) -> None:
    assert said(user_event(timestamp=value)) == ann(version=(NOW + 20, NOW + 20))
    assert said(deleted_event(timestamp=value)) == nothing(deleted_at=RECEIVED)
    assert said(user_event(data=user(last_sign_in_at=value))) == ann()
    assert said(session_event(data=session(created_at=value, user=user()), timestamp=NOW + 35)) == ann()
    with pytest.raises(Unreadable):
        said(session_event(data=session(created_at=value)))


@pytest.mark.parametrize("value", ODD_TIMES, ids=repr)
def test_a_user_with_odd_times_is_still_a_user(value: Any) -> None:
    for field in ("created_at", "updated_at"):
        found = said(user_event(data=user(**{field: value}), timestamp=NOW + 35))
        assert_storable(found)
        assert found.profile is not None
        assert found.profile.name == "Marisol Okonkwo"
        assert found.email is not None
        assert found.email.address == ADDRESS


@pytest.mark.parametrize("value", ODD_TIMES, ids=repr)
def test_a_profile_without_updated_at_is_newer_than_those_before_it(value: Any) -> None:
    before = user_event(data=user(updated_at=NOW - 500, created_at=NOW - 500, first_name="Old"))
    after = user_event(data=user(updated_at=value, created_at=NOW - 500), timestamp=NOW)
    found = said(after, before)
    assert found.profile is not None
    assert found.profile.name == "Marisol Okonkwo"


MEANINGFUL = {
    "created_at",
    "updated_at",
    "last_sign_in_at",
    "first_name",
    "last_name",
    "username",
    "email_addresses",
    "primary_email_address_id",
    "public_metadata",
}


@pytest.mark.parametrize("field", sorted(user().keys() - {"id"}))
def test_an_odd_field_of_a_user_loses_no_user(field: str) -> None:
    for value in ODD:
        data = user(**dict[str, Any]({field: value}))
        found = said(user_event(data=data, timestamp=NOW + 35))
        assert_storable(found)
        assert found.profile is not None
        if field not in MEANINGFUL:
            assert found == ann()


@pytest.mark.parametrize("field", sorted(session().keys() - {"user_id", "created_at", "actor"} | {"user"}))
def test_an_odd_field_of_a_session_loses_no_login(field: str) -> None:
    for value in ODD:
        assert said(session_event(data=session(**{field: value}))) == nothing(login_at=NOW)


@pytest.mark.parametrize("field", ["object", "instance_id", "event_attributes"])
def test_an_odd_field_of_the_envelope_changes_nothing(field: str) -> None:
    for value in ODD:
        assert said(user_event(**dict[str, Any]({field: value}))) == ann()


def test_odd_entries_among_the_addresses_lose_no_address() -> None:
    odd = [value for value in ODD if value is not ABSENT]
    entries = [*odd, *({"id": value, "email_address": value, "verification": value} for value in odd)]
    assert said(addresses(*entries, entry("a@example.com"), primary=email_id("a@example.com"))) == ann(
        email="a@example.com"
    )
    assert said(addresses(*entries, entry("a@example.com"))) == ann(email="a@example.com")


MARISOL = "user_36F9wJ2xNcVb6sQeLhG0pTrKyZa"
OONA = "user_2eXk5RzWcTq7VbNyLm0HpGsAuJd"
MARISOL_AT = "marisol.okonkwo@example.com"
SIGNED_UP_AT = 1764580211852


def shown(
    clerk_id: str,
    version: tuple[int, int],
    created_at: int,
    name: str,
    address: str | None = None,
    *,
    login_at: int | None = None,
) -> UserChange:
    """Return a change with this profile, without role and organization, and a verified address or none."""
    profile = Profile(Version(*version), created_at, name, None, "user")
    return UserChange(clerk_id, profile, EmailClaim(profile.version, address, bool(address)), login_at)


def in_session(observed_at: int) -> UserChange:
    version = (1764755003229, observed_at)
    return shown(MARISOL, version, SIGNED_UP_AT, "Marisol Okonkwo", MARISOL_AT, login_at=1764755003217)


WITH_PHONE = (1764671905534, 1764671905549)
WITH_WALLET = (1764702117031, 1764702117040)
UNLISTED = (1764719440147, 1764719440161)
RENAMED = Version(1764757811436, 1764757811459)
FIXTURES = {
    "user.created": shown(
        MARISOL, (1764580211879, 1764580211893), SIGNED_UP_AT, "Marisol Okonkwo", MARISOL_AT
    ),
    "user.updated": UserChange(
        MARISOL,
        Profile(RENAMED, SIGNED_UP_AT, "Marisol Jørgensen Okonkwo", "Fjord & Sønner A/S", "admin"),
        EmailClaim(RENAMED, "marisol@jørgensen-okonkwo.example", True),
        1764755003217,
    ),
    "user.created.phone": shown(
        "user_36Hn0QvTzXc4LbWpRk9MeYsAoJd", WITH_PHONE, 1764671905498, "Unnamed user"
    ),
    "user.created.wallet": shown(
        "user_36Jp7CzKsWb1RtNqYx5GuLvMoEh", WITH_WALLET, 1764702116995, "night_heron"
    ),
    "user.updated.unlisted-primary": shown(
        "user_36Kd4TmVbYx9QwLzGc2HsRnPuAe", UNLISTED, 1764719440120, "Teodor"
    )._replace(email=None),
    "user.created.older": shown(
        OONA, (1712563018229,) * 2, 1712563018204, "Oona Vasquez", "oona@example.com"
    ),
    "user.deleted": UserChange(MARISOL, deleted_at=1765012345678),
    "user.deleted.older": UserChange(OONA, deleted_at=RECEIVED),
    "session.created": in_session(1764755003246),
    "session.created.older": UserChange(OONA, login_at=1712563090410),
    "session.created.impersonated": in_session(1764843330133),
    "session.pending": UserChange(MARISOL, login_at=1764755120044),
    "session.ended": in_session(1764761200530),
    "session.removed": UserChange(MARISOL, login_at=1764755003205),
    "session.revoked": UserChange(MARISOL, login_at=1764755003205),
}


def test_every_fixture_has_its_meaning_here() -> None:
    assert {path.stem for path in PAYLOADS.glob("*.json")} == FIXTURES.keys()


@pytest.mark.parametrize("name", FIXTURES)
def test_what_a_fixture_means(name: str) -> None:
    assert said(payload(name)) == FIXTURES[name]


def test_a_name_is_visible_as_unicode_says() -> None:
    fillers = {"\u115f", "\u1160", "\u2800", "\u3164", "\uffa0"}
    for character in map(chr, range(0x110000)):
        category = unicodedata.category(character)
        if category in {"Cc", "Zs", "Zl", "Zp"} or character in fillers:
            assert INVISIBLE.fullmatch(character), ascii(character)
        elif category[0] in "LNPS":
            assert not INVISIBLE.fullmatch(character), ascii(character)
