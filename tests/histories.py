"""Histories: what may happen to a few users who share a few addresses, as the deliveries that tell of it.

`histories` are wild: few values, so that versions tie, claims contradict each other and snapshots disagree.
`orderly_histories` are what Clerk tells: every address has one owner at a time and time goes forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.clerk import (
    ABSENT,
    NOW,
    Json,
    deleted_event,
    email_entry,
    email_id,
    session,
    session_event,
    user,
    user_event,
)
from tests.model import Choices, Delivery

# By their bytes "-" < "B" < "_" < "a", which few other collations agree with.
CLERK_IDS = ("user_a", "user_B", "user_b", "user_-", "user__")
ADDRESSES = ("ann@example.com", "Zoe@example.com", "o'brien@example.com", "zoë@münchen.example")
UNSTORABLE = (
    "no address",
    "user_B@placeholder.invalid",
    "ann ben@example.com",
    "a" * 244 + "@example.com",
)
NAMES = (None, "", "Ann", "ann", "Zoe", "\ufffd", "\U0001f600", "An\0n", "n" * 255 + "a", "n" * 255 + "b")
ORGANIZATIONS = (None, "", "Acme", "acme", "\ud800")
ROLES = (None, "admin", "user", "owner")
SESSION_TYPES = ("session.created", "session.pending", "session.ended", "session.removed", "session.revoked")
START = NOW - NOW % 1000  # so that a timestamp in seconds ties with one in ms
LAST_MS = 253_402_214_399_999  # the last but one day of the year 9999: a datetime in every time zone
MINUTE = 60_000

choices = st.builds(
    Choices,
    st.sampled_from(["delete", "anonymize"]),
    st.sampled_from(["metadata", "none"]),
    st.sampled_from(["metadata", "none"]),
)

ticks = st.integers(0, 4).map(lambda tick: START + tick)
stamps = ticks | st.sampled_from([START // 1000, ABSENT])
sign_ins = st.none() | ticks | st.sampled_from([0, LAST_MS])


class Cast(NamedTuple):
    """Who takes part in a history, and the addresses that they share."""

    clerk_ids: list[str]
    addresses: list[str]


casts = st.builds(
    Cast,
    st.lists(st.sampled_from(CLERK_IDS), min_size=2, max_size=5, unique=True),
    st.lists(st.sampled_from(ADDRESSES), min_size=2, max_size=4, unique=True),
)


@st.composite
def histories(draw: st.DrawFn, max_size: int = 16) -> list[Delivery]:
    """Draw a wild history."""
    cast = draw(casts)
    events = draw(st.lists(any_event(cast), min_size=1, max_size=max_size))
    received = draw(st.lists(ticks, min_size=len(events), max_size=len(events)))
    return [
        Delivery(f"msg_{i}", event, at) for i, (event, at) in enumerate(zip(events, received, strict=True))
    ]


def any_event(cast: Cast) -> st.SearchStrategy[Json]:
    """Any event of somebody in the cast: mostly profiles."""
    return st.one_of(user_events(cast), user_events(cast), session_events(cast), deletions(cast))


@st.composite
def user_events(draw: st.DrawFn, cast: Cast) -> Json:
    """Draw user.created or user.updated."""
    type_ = draw(st.sampled_from(["user.created", "user.updated"]))
    return user_event(type_, draw(users(cast)), timestamp=draw(stamps))


@st.composite
def deletions(draw: st.DrawFn, cast: Cast) -> Json:
    """Draw user.deleted."""
    return deleted_event(draw(st.sampled_from(cast.clerk_ids)), timestamp=draw(stamps))


@st.composite
def session_events(draw: st.DrawFn, cast: Cast) -> Json:
    """Draw an event of a session: with its user, with another, with none; of the user or of staff."""
    carried = draw(st.one_of(st.sampled_from([ABSENT, None]), users(cast)))
    owner = carried["id"] if isinstance(carried, dict) and draw(st.booleans()) else None
    data = session(
        owner or draw(st.sampled_from(cast.clerk_ids)),
        created_at=draw(ticks),
        updated_at=draw(ticks),
        actor=draw(st.sampled_from([None, None, ABSENT, {"sub": "user_staff"}])),
        user=carried,
    )
    return session_event(draw(st.sampled_from(SESSION_TYPES)), data, timestamp=draw(stamps))


@st.composite
def users(draw: st.DrawFn, cast: Cast) -> Json:
    """Draw a user's JSON."""
    metadata = {"role": draw(st.sampled_from(ROLES)), "organization": draw(st.sampled_from(ORGANIZATIONS))}
    return user(
        draw(st.sampled_from(cast.clerk_ids)),
        first_name=draw(st.sampled_from(NAMES)),
        last_name=None,
        username=draw(st.sampled_from([None, "", "b"])),
        created_at=draw(st.sampled_from([START, START, START + 1, 0])),
        updated_at=draw(ticks),
        last_sign_in_at=draw(sign_ins),
        public_metadata={key: value for key, value in metadata.items() if value is not None},
        unsafe_metadata={"role": "admin", "organization": "Unsafe"},
        **draw(st.sampled_from(cast.addresses).flatmap(address_fields)),
    )


def address_fields(address: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the fields by which a user claims `address`, claims nothing, or says nothing about it."""
    entry, other = email_entry(address), email_entry("other@example.com", verified=False)
    claimed = fields([entry], entry["id"])
    return st.sampled_from(
        [
            claimed,
            claimed,
            fields([other, entry], entry["id"]),
            fields([other, entry], None),
            fields([other], None),
            fields([], None),
            fields([entry], "idn_unlisted"),
            fields([], email_id(address)),
            *(fields([email_entry(text)], email_id(text)) for text in UNSTORABLE),
        ]
    )


def fields(entries: list[Json], primary: str | None) -> dict[str, Any]:
    """Return the two fields that tell a user's address."""
    return {"email_addresses": entries, "primary_email_address_id": primary}


@dataclass
class Person:
    """A user as Clerk knows it in an orderly history."""

    clerk_id: str
    address: str | None
    name: str
    created_at: int
    updated_at: int
    last_login_at: int | None = None
    is_deleted: bool = False

    def json(self) -> Json:
        """Return what a payload shows of this user now."""
        return user(
            self.clerk_id,
            self.address,
            first_name=self.name,
            last_name=None,
            created_at=self.created_at,
            updated_at=self.updated_at,
            last_sign_in_at=self.last_login_at,
        )


@dataclass
class World:
    """Clerk's side of an orderly history: whatever happens is remembered, and told by an event."""

    addresses: list[str]
    now: int = START
    people: dict[str, Person] = field(default_factory=dict)
    told: list[Json] = field(default_factory=list)

    def living(self) -> list[Person]:
        """Return the users who are not deleted."""
        return [person for person in self.people.values() if not person.is_deleted]

    def free_addresses(self) -> list[str | None]:
        """Return what a user may take as address now, none included."""
        taken = {person.address for person in self.living()}
        return [None, *(address for address in self.addresses if address not in taken)]

    def sign_up(self, clerk_id: str, address: str | None) -> None:
        """Let a new user come."""
        self.people[clerk_id] = Person(clerk_id, address, "Ann", self.now, self.now + 25)
        self._tell(user_event("user.created", self.people[clerk_id].json()))

    def update(self, person: Person, name: str, address: str | None) -> None:
        """Change a user's name and address."""
        person.name, person.address, person.updated_at = name, address, self.now
        self._tell(user_event("user.updated", person.json()))

    def sign_in(self, person: Person, type_: str, *, carries_user: bool) -> None:
        """Let a user sign in; `updated_at` moves with `last_sign_in_at`."""
        person.last_login_at = person.updated_at = self.now
        shown = person.json() if carries_user else ABSENT
        self._tell_session(type_, session(person.clerk_id, created_at=self.now, user=shown))

    def impersonate(self, person: Person) -> None:
        """Let staff sign in as a user."""
        data = session(person.clerk_id, created_at=self.now, actor={"sub": "user_staff"}, user=person.json())
        self._tell_session("session.created", data)

    def delete(self, person: Person) -> None:
        """Delete a user."""
        person.is_deleted = True
        self._tell(deleted_event(person.clerk_id, timestamp=self.now))

    def deliveries(self) -> list[Delivery]:
        """Return what was told, in the order in which it happened."""
        return [Delivery(f"msg_{i}", event, START + i) for i, event in enumerate(self.told)]

    def _tell_session(self, type_: str, data: Json) -> None:
        data["updated_at"] = self.now + 10
        self._tell(session_event(type_, data, timestamp=self.now + 20))

    def _tell(self, event: Json) -> None:
        self.told.append(event)
        self.now += MINUTE


@st.composite
def orderly_histories(draw: st.DrawFn, max_size: int = 16) -> World:
    """Draw what Clerk may really tell, with the state that it leaves at Clerk."""
    cast = draw(casts)
    world = World(cast.addresses)
    for step in draw(st.lists(st.randoms(use_true_random=False), min_size=2, max_size=max_size)):
        happen(world, cast, step)
    return world


def happen(world: World, cast: Cast, random: Random) -> None:
    """Let one thing happen in `world`."""
    newcomers = [clerk_id for clerk_id in cast.clerk_ids if clerk_id not in world.people]
    living = world.living()
    address = random.choice(world.free_addresses())
    if not living or (newcomers and random.random() < 0.3):
        if newcomers:
            world.sign_up(random.choice(newcomers), address)
        return
    person = random.choice(living)
    match random.choice(["update", "update", "update", "sign in", "impersonate", "delete"]):
        case "update":
            world.update(person, random.choice(["Ann", "Zoe"]), random.choice([address, person.address]))
        case "sign in":
            world.sign_in(person, random.choice(SESSION_TYPES), carries_user=random.random() < 0.5)
        case "impersonate":
            world.impersonate(person)
        case _:
            world.delete(person)


class Plan(NamedTuple):
    """One way to deliver a history: batches in an order, and how many workers apply them."""

    batches: list[list[Delivery]]
    workers: int


def plans(deliveries: list[Delivery], random: Random, *, workers: int) -> Iterator[Plan]:
    """Yield ever new ways to deliver the same: another order, repetition and split each time."""
    while True:
        order = [*deliveries, *random.choices(deliveries, k=random.randint(0, len(deliveries)))]
        random.shuffle(order)
        yield Plan(split(order, random), random.randint(1, workers))


def split(order: list[Delivery], random: Random) -> list[list[Delivery]]:
    """Split deliveries into batches of random sizes, from one by one to all at once."""
    largest = random.choice([1, 3, len(order)])
    batches = []
    while order:
        size = random.randint(1, largest)
        batches.append(order[:size])
        order = order[size:]
    return batches
