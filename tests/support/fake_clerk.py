"""A small fake of Clerk's Backend API, as a real HTTP server: what its OpenAPI description says of users and
memberships.

    with FakeClerk() as clerk:
        clerk.put(user(ANN))
        clerk.put_members(membership(ANN, organization(name="Acme")))
        clerk.answer_next(429, headers={"Retry-After": "1"})
        httpx.get(f"{clerk.url}/v1/users", headers={"Authorization": f"Bearer {clerk.key}"})

    python -m tests.support.fake_clerk --users 100000  # in a process of its own, with as many made-up users

What it can do to its caller beyond that is in the attributes of FakeClerk.
"""

import argparse
import json
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from tests.support.payloads import INSTANCE, NOW, Json, body, membership, organization, user

KEY = "sk_live_9fK2mQ7xVbN4tR8wZc3LhY6s"
MAX_PAGE = 500
DEFAULT_PAGE = 10
MAX_IDS = 100
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
ORDERS = ("created_at", "updated_at")
NO_ORGANIZATION: Json = {}
ENTRIES = {"email_address": "email_addresses", "phone_number": "phone_numbers"}
FILTERS = {*ENTRIES, "username", "external_id"}


class Request(NamedTuple):
    """A request that came; `path` without /v1, every parameter with all its values."""

    path: str
    parameters: dict[str, list[str]]
    at: float

    def parameter(self, name: str, default: str = "") -> str:
        return self.parameters.get(name, [default])[0]


class Response(NamedTuple):
    """An answer. With `cut` the connection is closed after that many bytes of the body.

    With `pause_s` each byte of the body comes so much later than the one before.
    """

    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    cut: int | None = None
    pause_s: float = 0


class Record(NamedTuple):
    """A user, in the order in which a list shows it; `body` makes the JSON when it is wanted."""

    created_at: int
    updated_at: int
    id: str
    body: Callable[[], bytes]


class FakeMember(NamedTuple):
    """A membership, in the order in which a list shows it; `json` makes it, but for the organization."""

    created_at: int
    id: str
    user_id: str
    organization_id: str
    json: Callable[[], Json]


class FakeClerk:
    """The server. Its attributes may be changed while it runs, also by `before`."""

    def __init__(self, *, key: str = KEY, port: int = 0) -> None:
        self.key = key
        self.instance_id = INSTANCE
        self.knows_cursor = True  # else it is overlooked, as by servers before August 2026
        self.knows_user_id = True  # else the filter is overlooked
        self.rate_limit, self.rate_period_s = 1000, 10.0
        self.lists_at_most: int | None = None  # the listing ends there, and says nothing of it
        self.counts: int | None = None  # what /users/count says, when that is not the truth
        self.hidden: set[str] = set()  # left out of the listing, but there when asked for by id
        self.lists_members_at_most: int | None = None  # the same for memberships
        self.counts_members: int | None = None  # what a list of them says of their number
        self.hidden_members: set[str] = set()  # left out of the list of all, but in that of their user
        self.shortens_pages_to: int | None = None
        self.ahead_s: float | None = None  # its clock, in the header Date; None: no such header
        self.before: Callable[[Request], None] = lambda _: None  # called before every answer
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._at_once = 0
        self._records: dict[str, Record] = {}
        self._by_creation: list[tuple[int, str]] = []
        self._members: dict[str, FakeMember] = {}
        self._by_joining: list[tuple[int, str]] = []
        self._members_of: defaultdict[str, list[str]] = defaultdict(list)
        self._organizations: dict[str, Json] = {}
        self._canned: deque[tuple[str, Response]] = deque()
        self._recent: deque[float] = deque()
        self._lock = threading.RLock()
        self._counting = threading.Lock()  # not the same: requests arrive while `before` holds one up
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        """What CLERK_API_URL is to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def put(self, *users: Json) -> None:
        """Create users, or replace those of the same id."""
        for each in users:
            self._put(
                Record(each["created_at"], each["updated_at"], each["id"], partial(body, deepcopy(each)))
            )

    def put_many(self, count: int, first: int = 0) -> None:
        """Create made-up users, numbered from `first`; each is made anew whenever it is shown."""
        template = body(user("{id}", "{email}", first_name="{name}", created_at=-1, updated_at=-2)).decode()
        parts = _split(template, "{id}", "{email}", "{name}", "-1,", "-2,")
        for i in range(first, first + count):
            self._put(_numbered(i, parts))

    def remove(self, *clerk_ids: str) -> None:
        with self._lock:
            for clerk_id in clerk_ids:
                self._remove(clerk_id)
                self.remove_members(*self.members_of(clerk_id))

    def put_members(self, *memberships: Json) -> None:
        """Create memberships, or replace those of the same id; their organizations are as they show them."""
        with self._lock:
            for each in memberships:
                self.put_organization(each["organization"])
                user_id, of = each["public_user_data"]["user_id"], each["organization"]["id"]
                self._put_member(
                    FakeMember(each["created_at"], each["id"], user_id, of, partial(deepcopy, each))
                )

    def put_many_members(self, count: int) -> None:
        """Let as many made-up users be members of ten made-up organizations; each is made anew when shown."""
        with self._lock:
            for i in range(count):
                of = f"org_2fake{i % 10}"
                self._organizations.setdefault(of, organization(of, f"Firm {i % 10}"))
                id_, at = f"orgmem_2fake{i:08}", NOW - 10_000_000 + i
                make = partial(
                    membership, numbered_id(i), NO_ORGANIZATION, id=id_, created_at=at, updated_at=at
                )
                self._put_member(FakeMember(at, id_, numbered_id(i), of, make))

    def remove_members(self, *membership_ids: str) -> None:
        with self._lock:
            for id_ in membership_ids:
                member = self._members.pop(id_)
                self._members_of[member.user_id].remove(id_)
                del self._by_joining[bisect_left(self._by_joining, (member.created_at, id_))]

    def members_of(self, clerk_id: str) -> list[str]:
        with self._lock:
            return list(self._members_of[clerk_id])

    def member_ids(self) -> list[str]:
        with self._lock:
            return list(self._members)

    def put_organization(self, shown: Json) -> None:
        """Let an organization be so from now on, in every membership of it."""
        with self._lock:
            self._organizations[shown["id"]] = deepcopy(shown)

    def remove_organization(self, organization_id: str) -> None:
        """Delete an organization, and with it the memberships of it."""
        with self._lock:
            gone = [id_ for id_, it in self._members.items() if it.organization_id == organization_id]
            self.remove_members(*gone)

    def ids(self) -> list[str]:
        """Return the ids of all users, in the order of their creation."""
        with self._lock:
            return [clerk_id for _, clerk_id in self._by_creation]

    def text(self, clerk_id: str) -> str:
        return self._records[clerk_id].body().decode()

    def user(self, clerk_id: str) -> Json:
        shown: Json = json.loads(self.text(clerk_id))
        return shown

    def answer_next(
        self,
        status: int,
        text: str | bytes = "",
        *,
        path: str = "",
        times: int = 1,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        pause_s: float = 0,
    ) -> None:
        """Answer the next requests so, those for `path` where it is given; 429 with Clerk's body for it."""
        if status == 429 and not text:
            text = TOO_MANY.body
        encoded = text.encode() if isinstance(text, str) else text
        canned = Response(status, encoded, headers or {"Content-Type": "application/json"}, cut, pause_s)
        with self._lock:
            self._canned.extend([(path, canned)] * times)

    def show_next(self, entries: Sequence[object], path: str = "/users") -> None:
        """Answer the next request with these entries."""
        self.answer_next(200, body(entries), path=path)

    def answer(self, request: Request, authorization: str) -> Response:
        with self._lock:
            self.requests.append(request)
            self.before(request)
            if canned := self._next_canned(request):
                return canned
            if refused := self._over_limit(request.at):
                return refused
            if authorization != f"Bearer {self.key}":
                return error(401, "authentication_invalid", "Unable to verify credentials")
            return self._route(request)

    def entered(self) -> None:
        """Count a request that is being answered."""
        with self._counting:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def left(self) -> None:
        """Count it no more."""
        with self._counting:
            self._at_once -= 1

    @property
    def asked(self) -> list[Request]:
        """The requests about users and memberships; whose the key is, is asked once."""
        return [request for request in self.requests if request.path != "/instance"]

    def requests_for(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def most_within(self, seconds: float) -> int:
        """Return how many requests came within any such time at most."""
        times = sorted(request.at for request in self.requests)
        return max((bisect_right(times, start + seconds) - i for i, start in enumerate(times)), default=0)

    def _put(self, record: Record) -> None:
        with self._lock:
            if record.id in self._records:
                self._remove(record.id)
            self._records[record.id] = record
            insort(self._by_creation, (record.created_at, record.id))

    def _remove(self, clerk_id: str) -> None:
        record = self._records.pop(clerk_id)
        del self._by_creation[bisect_left(self._by_creation, (record.created_at, clerk_id))]

    def _put_member(self, member: FakeMember) -> None:
        if member.id in self._members:
            self.remove_members(member.id)
        self._members[member.id] = member
        self._members_of[member.user_id].append(member.id)
        insort(self._by_joining, (member.created_at, member.id))

    def _next_canned(self, request: Request) -> Response | None:
        for i, (path, canned) in enumerate(self._canned):
            if path in {"", request.path}:
                del self._canned[i]
                return canned
        return None

    def _over_limit(self, now: float) -> Response | None:
        while self._recent and self._recent[0] <= now - self.rate_period_s:
            self._recent.popleft()
        if len(self._recent) < self.rate_limit:
            self._recent.append(now)
            return None
        wait_s = int(self._recent[0] + self.rate_period_s - now) + 1
        return TOO_MANY._replace(headers={**TOO_MANY.headers, "Retry-After": str(wait_s)})

    def _route(self, request: Request) -> Response:
        match request.path.strip("/").split("/"):
            case ["users"]:
                return self._list(request)
            case ["users", "count"]:
                count = len(self._matching(request)) if self.counts is None else self.counts
                return answer({"object": "total_count", "total_count": count})
            case ["users", clerk_id] if clerk_id in self._records:
                return Response(200, self._records[clerk_id].body(), JSON)
            case [*owner, "organization_memberships"]:
                return self._list_members(request, owner)
            case ["instance"]:
                return answer(
                    {"object": "instance", "id": self.instance_id, "environment_type": "production"}
                )
        return error(404, "resource_not_found", "not found")

    def _list(self, request: Request) -> Response:
        order = request.parameter("order_by", "-created_at")
        field, cursor = order.lstrip("+-"), request.parameter("starting_after")
        offset = int(request.parameter("offset", "0"))
        asked = request.parameters.get("user_id", [])
        if field not in ORDERS or len(asked) > MAX_IDS:
            return error(422, "form_param_value_invalid", "is invalid")
        if cursor and self.knows_cursor and (field != "created_at" or offset):
            return error(422, "form_param_value_invalid", "starting_after is invalid")
        if cursor and self.knows_cursor and cursor not in self._records:
            return error(422, "form_param_value_invalid", "starting_after is invalid")
        limit = self._limit(request)
        if (asked and self.knows_user_id) or FILTERS & request.parameters.keys():
            return _array(self._matching(request)[offset : offset + limit])
        rows = list(self._page(field, cursor, offset, limit, descending=order.startswith("-")))
        return _array(rows)

    def _matching(self, request: Request) -> list[Record]:
        """Return the users that the filters of a request leave."""
        found = list(self._records.values())
        asked = request.parameters.get("user_id", []) if self.knows_user_id else []
        if asked:
            found = [self._records[clerk_id] for clerk_id in asked if clerk_id in self._records]
        for name in FILTERS & request.parameters.keys():
            wanted = set(request.parameters[name])
            found = [record for record in found if wanted & _values(json.loads(record.body()), name)]
        return found

    def _list_members(self, request: Request, owner: list[str]) -> Response:
        """Answer with memberships; `owner` is empty or the path of the user whose they are to be."""
        if owner and owner[-1] not in self._records:
            return error(404, "resource_not_found", "not found")
        order = request.parameter("order_by", "-created_at")
        if order.lstrip("+-") != "created_at":
            return error(422, "form_param_value_invalid", "is invalid")
        listed = self._by_joining
        if owner:
            listed = sorted((self._members[id_].created_at, id_) for id_ in self.members_of(owner[-1]))
        elif self.hidden_members:
            listed = [entry for entry in listed if entry[1] not in self.hidden_members]
        if order.startswith("-"):
            listed = listed[::-1]
        count = len(listed) if self.counts_members is None else self.counts_members
        limit, offset = self._limit(request), int(request.parameter("offset", "0"))
        shown = listed[: self.lists_members_at_most][offset : offset + limit]
        return answer({"data": [self._member(self._members[id_]) for _, id_ in shown], "total_count": count})

    def _member(self, member: FakeMember) -> Json:
        return {**member.json(), "organization": self._organizations[member.organization_id]}

    def _limit(self, request: Request) -> int:
        limit = int(request.parameter("limit", str(DEFAULT_PAGE)))
        if not 0 < limit <= MAX_PAGE:
            limit = DEFAULT_PAGE
        return limit if self.shortens_pages_to is None else min(limit, self.shortens_pages_to)

    def _page(
        self, field: str, cursor: str, offset: int, limit: int, *, descending: bool
    ) -> Iterator[Record]:
        listed = self._by_creation
        if field == "updated_at":
            listed = sorted((record.updated_at, record.id) for record in self._records.values())
        if self.hidden:
            listed = [entry for entry in listed if entry[1] not in self.hidden]
        if descending:
            listed = listed[::-1]
        if cursor and self.knows_cursor:
            offset = (
                1 + listed.index((self._records[cursor].created_at, cursor))
                if descending
                else bisect_right(listed, (self._records[cursor].created_at, cursor))
            )
        end = offset + limit if self.lists_at_most is None else min(offset + limit, self.lists_at_most)
        for _, clerk_id in listed[offset:end]:
            yield self._records[clerk_id]


def _values(shown: Json, name: str) -> set[str]:
    """Return what a filter compares with."""
    if name in ("email_address", "phone_number"):
        return {entry[name] for entry in shown[ENTRIES[name]]}
    return {shown[name]} if shown.get(name) else set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], clerk: FakeClerk) -> None:
        super().__init__(address, _Handler)
        self.clerk = clerk

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a caller that is killed leaves its connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        request = Request(parts.path.removeprefix("/v1"), parse_qs(parts.query), time.monotonic())
        self.server.clerk.entered()
        try:
            response = self.server.clerk.answer(request, self.headers.get("Authorization", ""))
        finally:
            self.server.clerk.left()  # before its answer, which the caller may follow up at once
        self._send(response)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _send(self, response: Response) -> None:
        # In one piece: two would wait for each other on the way (Nagle and delayed acknowledgements).
        self.close_connection = response.cut is not None
        headers = {**response.headers, "Content-Length": str(len(response.body))}
        if (ahead_s := self.server.clerk.ahead_s) is not None:
            headers.setdefault("Date", formatdate(time.time() + ahead_s, usegmt=True))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {response.status} {self.responses.get(response.status, ('?',))[0]}\r\n{lines}\r\n"
        if response.pause_s:
            self.wfile.write(head.encode())
            for byte in response.body:
                time.sleep(response.pause_s)
                self.wfile.write(bytes([byte]))
            return
        self.wfile.write(head.encode() + response.body[: response.cut])


JSON = {"Content-Type": "application/json"}


def answer(value: object) -> Response:
    return Response(200, json.dumps(value).encode(), JSON)


def error(status: int, code: str, message: str) -> Response:
    errors = [{"message": message, "long_message": message, "code": code, "meta": {}}]
    text = json.dumps({"errors": errors, "clerk_trace_id": TRACE_ID})
    return Response(status, text.encode(), JSON)


TOO_MANY = error(429, "too_many_requests", "Too many requests. Please retry later")


def numbered_id(number: int) -> str:
    return f"user_2fake{number:08}"


def _array(records: list[Record]) -> Response:
    return Response(200, b"[" + b",".join(record.body() for record in records) + b"]", JSON)


def _numbered(number: int, parts: list[str]) -> Record:
    clerk_id, created_at = numbered_id(number), NOW - 10_000_000 + number
    values = {
        "{id}": clerk_id,
        "{email}": f"user{number}@example.com",
        "{name}": f"Name {number}",
        "-1,": f"{created_at},",
        "-2,": f"{created_at + 20},",
    }

    def text() -> bytes:
        return "".join([values.get(part, part) for part in parts]).encode()

    return Record(created_at, created_at + 20, clerk_id, text)


def _split(text: str, *marks: str) -> list[str]:
    parts = [text]
    for mark in marks:
        parts = [piece for part in parts for piece in _around(part, mark)]
    return parts


def _around(text: str, mark: str) -> list[str]:
    pieces = text.split(mark)
    return [pieces[0], *(piece for after in pieces[1:] for piece in (mark, after))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--members", type=int, default=0, help="how many of them are in an organization")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    clerk = FakeClerk(port=arguments.port)
    clerk.put_many(arguments.users)
    clerk.put_many_members(arguments.members)
    with clerk:
        print(f"CLERK_API_URL={clerk.url} CLERK_SECRET_KEY={clerk.key}", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()


def show_without_id(clerk: FakeClerk, without_id: set[str], request: Request) -> None:
    """Show the users of these ids as entries that have none, at every request for users."""
    if request.path == "/users":
        cursor, offset = request.parameter("starting_after"), int(request.parameter("offset", "0"))
        if cursor and not clerk.knows_cursor:
            cursor = ""
        start = clerk.ids().index(cursor) + 1 if cursor else offset
        shown = clerk.ids()[start : start + 500]
        clerk.show_next([None if clerk_id in without_id else clerk.user(clerk_id) for clerk_id in shown])


def show_first(clerk: FakeClerk, entries: list[object], request: Request) -> None:
    """Show these entries at a request for the beginning of the list of users."""
    if request.path == "/users" and not request.parameter("starting_after"):
        clerk.show_next(entries)


def happen_at(clerk: FakeClerk, happen: Callable[[], None], after: int, _: Request) -> None:
    """Let something happen before the answer to the request that follows `after` others."""
    if len(clerk.requests) == after + 1:
        happen()
