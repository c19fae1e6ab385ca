"""The deliveries of the demo: an hour of events, some of them late, repeated or in the wrong order."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from cli import samples
from cli.samples import HOUR, MINUTE, Json

NAMES: dict[str, Json] = {
    "ann": {"first_name": "Ann", "last_name": "Archer"},
    "ben": {"first_name": "Ben", "last_name": "Baker"},
    "cat": {"username": "catriona"},
    "dan": {"first_name": "Dan", "last_name": "Draper"},
    "eva": {"first_name": "Eva", "last_name": "Ellis"},
    "fay": {"first_name": "Fay", "last_name": "Fisher"},
    "gus": {"first_name": "Gus", "last_name": "Glover"},
    "hal": {"first_name": "Hal", "last_name": "Hunter"},
    "ivy": {"first_name": "Ivy", "last_name": "Irons"},
    "jon": {"first_name": "Jon", "last_name": "Jensen"},
    "kim": {"first_name": "Kim", "last_name": "Keller"},
}


class StoryStep(NamedTuple):
    """One delivery, signed `age_s` seconds ago."""

    line: str
    svix_id: str
    body: bytes
    is_forged: bool = False
    age_s: int = 0
    chapter: str = ""


class Story:
    """An hour of a few users, whose ids and addresses contain the tag of one run."""

    def __init__(self, tag: str, now: int, instance_id: str) -> None:
        """Make a story that ends at `now` (ms)."""
        self._tag = tag
        self._began = now - HOUR
        self._instance_id = instance_id

    @property
    def clerk_ids(self) -> list[str]:
        """The Clerk ids of all its users."""
        return [self.clerk_id(name) for name in NAMES]

    def clerk_id(self, name: str) -> str:
        """Return the Clerk id of that name."""
        return f"user_{name}{self._tag}"

    def steps(self) -> list[StoryStep]:
        """Return every delivery, in the order of their arrival."""
        chapters = {
            "Ordinary days": self._ordinary_days,
            "An address is handed over": self._an_address_handed_over,
            "Late and out of order": self._late_and_out_of_order,
            "Deletions are final": self._deletions,
            "Sign-ins": self._sign_ins,
            "What changes nothing": self._what_changes_nothing,
        }
        return [step._replace(chapter=title) for title, steps in chapters.items() for step in steps()]

    def _ordinary_days(self) -> Iterator[StoryStep]:
        yield self._signs_up("Ann signs up", "ann")
        yield self._session("Ann signs in", "ann", 5)
        signed_in = self._changes("Ann's profile says so too", "ann", 5, last_sign_in_at=self._at(5))
        yield signed_in
        yield signed_in._replace(line="The same delivery again")
        yield signed_in._replace(line="And once more")
        phone = {"id": samples.new_id("idn"), "object": "phone_number", "phone_number": "+12015550123"}
        yield self._signs_up(
            "Ben signs up with a phone number only",
            "ben",
            email=None,
            phone_numbers=[phone],
            primary_phone_number_id=phone["id"],
        )
        yield self._session("Ben signs in", "ben", 6)
        yield self._signs_up("Cat signs up with a username and no name", "cat")
        yield self._session("Cat signs in", "cat", 7)
        yield self._changes("Cat becomes an admin of Acme", "cat", 8, public_metadata=_acme("admin"))

    def _an_address_handed_over(self) -> Iterator[StoryStep]:
        team = self._address("team")
        yield self._signs_up("Dan signs up with the team's address", "dan", email=team)
        yield self._signs_up("Eva signs up with her own", "eva")
        yield self._changes("Eva takes over the team's: comes first", "eva", 21, email=team)
        yield self._changes("Dan had let it go by then: comes second", "dan", 20)

    def _late_and_out_of_order(self) -> Iterator[StoryStep]:
        yield self._changes("Fay joins Acme: comes first", "fay", 15, public_metadata=_acme("user"))
        yield self._signs_up("Fay signs up: comes second", "fay")
        yield self._session("Fay signs out", "fay", 12, "ended")
        yield self._signs_up("Ivy signs up", "ivy")
        yield self._changes("Ivy leaves Acme again", "ivy", 45)
        yield self._changes(
            "Ivy had joined Acme before: comes late", "ivy", 30, public_metadata=_acme("user")
        )
        yield self._session("Ivy signs in", "ivy", 50)
        yield self._session("Ivy's sign-in half an hour before: late", "ivy", 20)

    def _deletions(self) -> Iterator[StoryStep]:
        yield self._signs_up("Gus signs up", "gus")
        yield self._session("Gus signs in", "gus", 10)
        deletion = self._deleted("Gus is deleted", "gus", 40)
        yield deletion
        yield deletion._replace(line="The same delivery again")
        yield self._session("Gus's session is revoked with that", "gus", 10, "revoked")
        yield self._changes("A change of Gus from before: too late", "gus", 35)
        yield self._deleted("Hal is deleted: comes first", "hal", 42)
        yield self._signs_up("Hal signs up: comes second", "hal")

    def _sign_ins(self) -> Iterator[StoryStep]:
        yield self._signs_up("Jon signs up", "jon")
        yield self._session("Jon signs in", "jon", 9)
        staff = {"sub": self.clerk_id("staff")}
        yield self._session("Support signs in as Jon: no login of his", "jon", 55, actor=staff)
        yield self._session("Support signs out", "jon", 55, "ended", actor=staff)
        yield self._session("Kim signs in: comes first", "kim", 11)
        yield self._signs_up("Kim signs up: comes second", "kim")
        yield self._session("Kim's browser drops the session", "kim", 11, "removed")

    def _what_changes_nothing(self) -> Iterator[StoryStep]:
        forged = self._changes("A stranger makes Ben an admin", "ben", 58, public_metadata=_acme("admin"))
        yield forged._replace(is_forged=True)
        yield self._signs_up("Ann signs up: signed an hour ago", "ann")._replace(age_s=3600)
        entry = {"id": samples.new_id("wait"), "object": "waitlist_entry", "status": "pending"}
        yield self._step("A visitor joins a waiting list", "waitlistEntry.created", entry)
        without_id = self._person("ann", 59) | {"id": None}
        yield self._step("A user without an id", "user.updated", without_id)

    def _signs_up(self, line: str, name: str, **fields: Any) -> StoryStep:
        return self._step(line, "user.created", self._person(name, 0, **fields))

    def _changes(self, line: str, name: str, minute: int, **fields: Any) -> StoryStep:
        return self._step(line, "user.updated", self._person(name, minute, **fields))

    def _session(self, line: str, name: str, minute: int, what: str = "created", **fields: Any) -> StoryStep:
        session = samples.session(self.clerk_id(name), self._at(minute), what, **fields)
        return self._step(line, f"session.{what}", session)

    def _deleted(self, line: str, name: str, minute: int) -> StoryStep:
        return self._step(line, "user.deleted", samples.deleted(self.clerk_id(name)), self._at(minute))

    def _step(self, line: str, type_: str, data: Json, at: int | None = None) -> StoryStep:
        at = at or data.get("updated_at", self._began) + 15
        event = samples.event(type_, data, at, self._instance_id)
        return StoryStep(line, samples.new_id("msg"), samples.encode(event))

    def _person(self, name: str, minute: int, **fields: Any) -> Json:
        """Return a user's state at that minute; all users signed up in the first."""
        profile = {"email": self._address(name), "updated_at": self._at(minute) + 24, **NAMES[name], **fields}
        return samples.user(self.clerk_id(name), self._began, **profile)

    def _address(self, name: str) -> str:
        return f"{name}{self._tag}@example.com"

    def _at(self, minute: int) -> int:
        return self._began + minute * MINUTE


def _acme(role: str) -> Json:
    return {"role": role, "organization": "Acme"}
