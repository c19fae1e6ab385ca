"""Histories: what may happen to a few users who share a few addresses, as the deliveries that tell of it.

`histories` are wild: few values, so that versions tie, claims contradict each other and snapshots disagree.
`orderly_histories` are what Clerk tells: every address has one owner at a time and time goes forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.support.payloads import (
    ABSENT,
    NOW,
    Json,
    deleted_event,
    dissolved,
    email_entry,
    email_id,
    membership,
    membership_event,
    organization,
    organization_event,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.reference_model import Choices, SentEvent

# By their bytes "-" < "B" < "_" < "a", which few other collations agree with.
CLERK_IDS = ("user_a", "user_B", "user_b", "user_-", "user__")
ADDRESSES = ("ann@example.com", "Zoe@example.com", "o'brien@example.com", "zoë@münchen.example")
UNSTORABLE = ("no address", "user_B@placeholder.invalid", "ann ben@example.com", "a" * 244 + "@example.com")
NAMES = (
    None,
    "",
    "Ann",
    "ann",
    "Zoe",
    "\ufffd",
    "\U0001f600",
    "An\0n",
    "n" * 255 + "a",
    "n" * 255 + "b",
    "\u3164",
    "\u200b\ufeff",
)
ORGANIZATIONS = (None, "", "Acme", "acme", "\ud800")
UNSAFE: tuple[Any, ...] = (
    {"role": "admin", "organization": "Unsafe"},
    {"b": [1, 2.5, None, {"a\0": "\0\ud800"}], "a": True},
    {"a": 1e16, "b": -0.0, "c": 1e25, "d": 10**30, "e": 0.1},
    [],
    None,
)
ROLES = (None, "admin", "user", "owner")
ORGANIZATION_IDS = ("org_a", "org_B", "org_-")
ORGANIZATION_NAMES = (None, ABSENT, "", " ", "\0", "\u200b", "Acme", "acme", "Zoo", "\ud800", "n" * 256)
MEMBERSHIP_IDS = ("orgmem_a", "orgmem_B", "orgmem_b", "orgmem_-")
MEMBERSHIP_TYPES = (
    "organizationMembership.created",
    "organizationMembership.updated",
    "organizationMembership.deleted",
)
SESSION_TYPES = ("session.created", "session.pending", "session.ended", "session.removed", "session.revoked")
START = NOW - NOW % 1000  # so that a timestamp in seconds ties with one in ms
LAST_MS = 253_402_214_399_999  # the last but one day of the year 9999: a datetime in every time zone
MINUTE = 60_000

field_lists = st.sampled_from(
    [(), ("image_url", "username", "public_metadata"), ("banned", "unsafe_metadata")]
)
choices = st.builds(
    Choices,
    st.sampled_from(["delete", "anonymize"]),
    st.sampled_from(["metadata", "none"]),
    st.sampled_from(["metadata", "none"]),
    profile_fields=field_lists,
)

choices_of_source = st.builds(
    Choices,
    st.sampled_from(["delete", "anonymize"]),
    st.sampled_from(["metadata", "none"]),
    st.sampled_from(["membership"] * 4 + ["metadata", "none"]),
    st.sampled_from(["name", "id", "slug"]),
    field_lists,
)

ticks = st.integers(0, 4).map(lambda tick: START + tick)
stamps = ticks | st.sampled_from([START // 1000, ABSENT])
maybe_ticks = ticks | st.sampled_from([None, ABSENT])
instances = st.sampled_from(["ins_a", "ins_a", "ins_B", ABSENT])
sign_ins = st.none() | ticks | st.sampled_from([0, LAST_MS])


class Cast(NamedTuple):
    """Who takes part in a history, the addresses that they share, and the organizations that they join."""

    clerk_ids: list[str]
    addresses: list[str]
    organization_ids: list[str]


clerk_ids = st.lists(st.sampled_from(CLERK_IDS), min_size=2, max_size=5, unique=True)
addresses = st.lists(st.sampled_from(ADDRESSES), min_size=2, max_size=4, unique=True)
organization_ids = st.lists(st.sampled_from(ORGANIZATION_IDS), min_size=2, max_size=3, unique=True)
casts = st.builds(Cast, clerk_ids, addresses, st.just([]))
casts_of_members = st.builds(Cast, clerk_ids, addresses, organization_ids)


@st.composite
def histories(draw: st.DrawFn, max_size: int = 16, casts: st.SearchStrategy[Cast] = casts) -> list[SentEvent]:
    cast = draw(casts)
    events = draw(st.lists(any_event(cast), min_size=1, max_size=max_size))
    received = draw(st.lists(ticks, min_size=len(events), max_size=len(events)))
    return [
        SentEvent(f"msg_{i}", said_by(draw(instances), event), at)
        for i, (event, at) in enumerate(zip(events, received, strict=True))
    ]


def said_by(instance_id: Any, event: Json) -> Json:
    """Return the event as that Clerk instance sends it, ABSENT as before 2025."""
    others = {key: value for key, value in event.items() if key != "instance_id"}
    return others if instance_id is ABSENT else {**others, "instance_id": instance_id}


def any_event(cast: Cast) -> st.SearchStrategy[Json]:
    """Any event of a user in the cast: mostly profiles."""
    of_users = [user_events(cast), user_events(cast), session_events(cast), deletions(cast)]
    if not cast.organization_ids:
        return st.one_of(of_users)
    of_members = [membership_events(cast)] * 4
    return st.one_of(*of_users, *of_members, renames(cast), renames(cast), dissolutions(cast))


@st.composite
def user_events(draw: st.DrawFn, cast: Cast) -> Json:
    type_ = draw(st.sampled_from(["user.created", "user.updated"]))
    return user_event(type_, draw(users(cast)), timestamp=draw(stamps))


@st.composite
def deletions(draw: st.DrawFn, cast: Cast) -> Json:
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
    metadata = {"role": draw(st.sampled_from(ROLES)), "organization": draw(st.sampled_from(ORGANIZATIONS))}
    return user(
        draw(st.sampled_from(cast.clerk_ids)),
        first_name=draw(st.sampled_from(NAMES)),
        last_name=None,
        username=draw(st.sampled_from([None, "", "b", "\u200b"])),
        created_at=draw(st.sampled_from([START, START, START + 1, 0])),
        updated_at=draw(ticks),
        last_sign_in_at=draw(sign_ins),
        public_metadata={key: value for key, value in metadata.items() if value is not None},
        unsafe_metadata=draw(st.sampled_from(UNSAFE)),
        banned=draw(st.sampled_from([False, False, True, ABSENT])),
        organization_memberships=draw(shown_memberships(cast)),
        **draw(st.sampled_from(cast.addresses).flatmap(address_fields)),
    )


@st.composite
def membership_events(draw: st.DrawFn, cast: Cast) -> Json:
    """Draw an event of a membership; the same one may be of several users, and of several organizations."""
    data = draw(memberships(cast))
    return membership_event(draw(st.sampled_from(MEMBERSHIP_TYPES)), data, timestamp=draw(stamps))


@st.composite
def memberships(draw: st.DrawFn, cast: Cast) -> Json:
    return membership(
        draw(st.sampled_from(cast.clerk_ids)),
        draw(organizations(cast)),
        id=draw(st.sampled_from(MEMBERSHIP_IDS)),
        created_at=draw(maybe_ticks),
        updated_at=draw(maybe_ticks),
        role=draw(st.sampled_from(["org:member", "org:admin", "\0", None, ABSENT])),
    )


@st.composite
def organizations(draw: st.DrawFn, cast: Cast) -> Json:
    return organization(
        draw(st.sampled_from(cast.organization_ids)),
        draw(st.sampled_from(ORGANIZATION_NAMES)),
        updated_at=draw(maybe_ticks),
        slug=draw(st.sampled_from(["acme", "zoo", None])),
        image_url=draw(st.sampled_from(["https://img.example/1", ABSENT])),
    )


@st.composite
def renames(draw: st.DrawFn, cast: Cast) -> Json:
    return organization_event(data=draw(organizations(cast)), timestamp=draw(stamps))


@st.composite
def dissolutions(draw: st.DrawFn, cast: Cast) -> Json:
    data = dissolved(draw(st.sampled_from(cast.organization_ids)))
    return organization_event("organization.deleted", data, timestamp=draw(stamps))


def shown_memberships(cast: Cast) -> st.SearchStrategy[Any]:
    """Draw what a user's JSON shows of memberships: mostly nothing."""
    nothing: st.SearchStrategy[Any] = st.sampled_from([ABSENT, ABSENT, None, []])
    return nothing | st.lists(memberships(cast), max_size=2) if cast.organization_ids else nothing


def address_fields(address: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the fields by which a user claims `address`, claims nothing, or says nothing about it."""
    entry, other = email_entry(address), email_entry("other@example.com", verified=False)
    claimed, unverified = fields([entry], entry["id"]), email_entry(address, verified=False)
    return st.sampled_from(
        [
            claimed,
            claimed,
            fields([unverified], unverified["id"]),
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
    clerk_id: str
    address: str | None
    name: str
    created_at: int
    updated_at: int
    last_login_at: int | None = None
    is_deleted: bool = False

    def json(self) -> Json:
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
class Firm:
    id: str
    name: str
    updated_at: int
    is_dissolved: bool = False

    def json(self) -> Json:
        return organization(self.id, self.name, updated_at=self.updated_at)


@dataclass
class WorldMember:
    id: str
    clerk_id: str
    firm: Firm
    joined_at: int
    updated_at: int
    role: str = "org:member"
    has_left: bool = False

    @property
    def is_in(self) -> bool:
        """Whether this user is a member of an organization that is there."""
        return not (self.has_left or self.firm.is_dissolved)

    def json(self) -> Json:
        return membership(
            self.clerk_id,
            self.firm.json(),
            id=self.id,
            created_at=self.joined_at,
            updated_at=self.updated_at,
            role=self.role,
        )


@dataclass
class World:
    """Clerk's side of an orderly history: it remembers what happens, and emits an event for it."""

    addresses: list[str]
    now: int = START
    people: dict[str, Person] = field(default_factory=dict)
    firms: list[Firm] = field(default_factory=list)
    members: list[WorldMember] = field(default_factory=list)
    emitted: list[Json] = field(default_factory=list)

    def living(self) -> list[Person]:
        return [person for person in self.people.values() if not person.is_deleted]

    def living_ids(self) -> set[str]:
        return {person.clerk_id for person in self.living()}

    def free_addresses(self) -> list[str | None]:
        """Return what a user may take as address now, none included."""
        taken = {person.address for person in self.living()}
        return [None, *(address for address in self.addresses if address not in taken)]

    def sign_up(self, clerk_id: str, address: str | None) -> None:
        self.people[clerk_id] = Person(clerk_id, address, "Ann", self.now, self.now + 25)
        self._tell(user_event("user.created", self.people[clerk_id].json()))

    def update(self, person: Person, name: str, address: str | None) -> None:
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
        person.is_deleted = True
        self._tell(deleted_event(person.clerk_id, timestamp=self.now))

    def organization_of(self, person: Person, key: str) -> str | None:
        """Return the name, id or slug of the organization that a user joined last and is in."""
        stays = [member for member in self.members if member.clerk_id == person.clerk_id and member.is_in]
        return stays[-1].firm.json()[key] if stays else None

    def found(self, organization_id: str, name: str) -> None:
        """Let a new organization be there; no event reports that."""
        self.firms.append(Firm(organization_id, name, self.now))

    def join(self, person: Person, firm: Firm) -> None:
        id_ = f"orgmem_{len(self.members)}-{person.clerk_id}"
        self.members.append(WorldMember(id_, person.clerk_id, firm, self.now, self.now))
        self._tell(membership_event(data=self.members[-1].json(), timestamp=self.now))

    def promote(self, member: WorldMember) -> None:
        member.role, member.updated_at = "org:admin", self.now
        self._tell(membership_event("organizationMembership.updated", member.json(), timestamp=self.now))

    def leave(self, member: WorldMember) -> None:
        member.has_left = True
        self._tell(membership_event("organizationMembership.deleted", member.json(), timestamp=self.now))

    def rename(self, firm: Firm, name: str) -> None:
        firm.name, firm.updated_at = name, self.now
        self._tell(organization_event(data=firm.json(), timestamp=self.now))

    def dissolve(self, firm: Firm) -> None:
        """Delete an organization; no event reports its memberships."""
        firm.is_dissolved = True
        self._tell(organization_event("organization.deleted", dissolved(firm.id), timestamp=self.now))

    def deliveries(self) -> list[SentEvent]:
        """Return the events as deliveries, in the order in which they happened."""
        return [SentEvent(f"msg_{i}", event, START + i) for i, event in enumerate(self.emitted)]

    def _tell_session(self, type_: str, data: Json) -> None:
        data["updated_at"] = self.now + 10
        self._tell(session_event(type_, data, timestamp=self.now + 20))

    def _tell(self, event: Json) -> None:
        self.emitted.append(event)
        self.now += MINUTE


@st.composite
def orderly_histories(draw: st.DrawFn, max_size: int = 16, casts: st.SearchStrategy[Cast] = casts) -> World:
    """Draw what Clerk may really tell, with the state that it leaves at Clerk."""
    cast = draw(casts)
    world = World(cast.addresses)
    for step in draw(st.lists(st.randoms(use_true_random=False), min_size=2, max_size=max_size)):
        if world.people and cast.organization_ids and step.random() < 0.6:
            happen_to_organizations(world, cast, step)
        else:
            happen(world, cast, step)
    return world


def happen_to_organizations(world: World, cast: Cast, random: Random) -> None:
    """Let one thing happen to an organization or a member in `world`."""
    firms = [firm for firm in world.firms if not firm.is_dissolved]
    members = [member for member in world.members if member.is_in and member.clerk_id in world.living_ids()]
    if len(world.firms) < len(cast.organization_ids) and (not firms or random.random() < 0.3):
        world.found(cast.organization_ids[len(world.firms)], random.choice(["Acme", "Zoo"]))
        return
    match random.choice(["join", "join", "join", "promote", "leave", "rename", "rename", "dissolve"]):
        case "join" if firms and world.living():
            world.join(random.choice(world.living()), random.choice(firms))
        case "promote" if members:
            world.promote(random.choice(members))
        case "leave" if members:
            world.leave(random.choice(members))
        case "rename" if firms:
            world.rename(random.choice(firms), random.choice(["Acme", "Zoo", "New"]))
        case "dissolve" if firms:
            world.dissolve(random.choice(firms))


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


class BatchPlan(NamedTuple):
    """One way to deliver a history: batches in an order, and how many workers apply them."""

    batches: list[list[SentEvent]]
    workers: int


def plans(deliveries: list[SentEvent], random: Random, *, workers: int) -> Iterator[BatchPlan]:
    """Yield ever new ways to deliver the same: another order, repetition and split each time."""
    while True:
        order = [*deliveries, *random.choices(deliveries, k=random.randint(0, len(deliveries)))]
        random.shuffle(order)
        yield BatchPlan(split(order, random), random.randint(1, workers))


def split(order: list[SentEvent], random: Random) -> list[list[SentEvent]]:
    """Split deliveries into batches of random sizes, from one by one to all at once."""
    largest = random.choice([1, 3, len(order)])
    batches = []
    while order:
        size = random.randint(1, largest)
        batches.append(order[:size])
        order = order[size:]
    return batches
