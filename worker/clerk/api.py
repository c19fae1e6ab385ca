"""The requests that this project makes to Clerk's Backend API.

    GET /users         pages of at most 500, by cursor or by offset; up to 100 users by id
    GET /users/{id}    one user
    GET /users/count   how many there are
    GET /instance      which instance the key belongs to
    GET /organization_memberships              pages of all memberships, at most 500, with their number
    GET /users/{id}/organization_memberships   the same of one user

Every request respects Clerk's rate limit. Temporary errors are retried for a limited time: no connection,
5xx, an incomplete answer, and 429, after the time in its `Retry-After`. A call that would have to wait too
long fails at once.

    ClerkApiError
    ├── ClerkUnavailable   the error persisted; a later call may succeed
    └── ClerkRefused       the key, the URL or the request is wrong, or the server is not Clerk's API

No message contains the key, or anything about a user except the id.
Source: https://github.com/clerk/openapi-specs, and for the limits https://clerk.com/docs/guides/how-clerk-works/system-limits
"""

import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, NoReturn

import httpx
import tenacity

from config import ServiceError, Settings, SettingsError
from db.merge.change import is_foreign
from db.times import now_ms, to_ms
from worker.clerk.decoding import decode
from worker.clerk.errors import NotJson, Unreadable
from worker.clerk.payloads import (
    ClerkMember,
    ClerkUser,
    FieldSources,
    parse_member,
    parse_user,
    valid_id,
)
from worker.clerk.rate_limit import RateLimit
from worker.shutdown import Stopped, StopSignal

MAX_PAGE = 500  # with a greater `limit` Clerk uses its default, which is 10
MAX_IDS = 100
PERIOD_S = 10.0
LIMIT = 1000
DEVELOPMENT_LIMIT = 100
DEVELOPMENT_PREFIX = "sk_test_"
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0  # for each piece of an answer
ANSWER_TIMEOUTS = 3  # the whole answer may take this many read time-outs
CLOSE_TIMEOUT_S = 2.0
PATIENCE_S = 60.0
LIMITED_PATIENCE_S = 600.0
CLOCKS_AGREE_MS = 60_000  # a smaller difference may be the time that the answer took
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 3600.0  # more is no wait but a mistake, such as a time of day in s
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
NOT_FOUND = "resource_not_found"
NO_ORGANIZATIONS = "organization_not_enabled_in_instance"
CODE = re.compile("[a-z0-9_]{1,100}")
TRACE_ID = re.compile("[0-9A-Za-z]{1,100}")

OLDEST_FIRST = "+created_at"
LAST_UPDATED_FIRST = "-updated_at"


class ClerkApiError(ServiceError):
    """A request to Clerk's API failed. The message is one line that says what to do."""


class ClerkUnavailable(ClerkApiError):
    """Clerk's API does not answer now. `retry_after_s` is the wait that it requests, if any."""

    retryable = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClerkRefused(ClerkApiError):
    """Clerk's API refused the request, and would refuse it again. `code` is Clerk's error code."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def unexpected(what: str) -> ClerkRefused:
    """Return the error for an answer that does not match the request."""
    return ClerkRefused(f"Clerk's API did not answer with {what}: check CLERK_API_URL")


class InvalidEntry(NamedTuple):
    """A list entry that cannot be read as a user or membership: the reason, and its id if readable."""

    reason: str
    id: str | None = None


Entry = ClerkUser | ClerkMember | InvalidEntry


class Page(NamedTuple):
    """The answer to one request for users or memberships, in Clerk's order.

    `observed_at` (ms) is when the request was sent; the entries are at least as new. `total` is the number of
    all entries at Clerk, if the answer contains it.
    """

    entries: list[Entry]
    observed_at: int
    total: int | None = None

    @property
    def known(self) -> list[ClerkUser | ClerkMember]:
        """The entries that could be read."""
        return [entry for entry in self.entries if not isinstance(entry, InvalidEntry)]

    @property
    def users(self) -> list[ClerkUser]:
        """The readable entries that are users."""
        return [entry for entry in self.entries if isinstance(entry, ClerkUser)]

    @property
    def members(self) -> list[ClerkMember]:
        """The readable entries that are memberships."""
        return [entry for entry in self.entries if isinstance(entry, ClerkMember)]

    @property
    def ids(self) -> list[str]:
        """The ids of all entries that have one, also of unreadable entries."""
        return [entry.id for entry in self.entries if entry.id is not None]


class ApiResponse(NamedTuple):
    """A decoded body, and when its request was sent (ms): by Clerk's clock, where this machine's is wrong."""

    body: Any
    observed_at: int


Limiter = Callable[[], AbstractContextManager[None]]


def rate_limit(settings: Settings) -> int:
    """Return how many requests in PERIOD_S Clerk allows for the settings' key."""
    key = settings.clerk_secret_key.get_secret_value() if settings.clerk_secret_key else ""
    return DEVELOPMENT_LIMIT if key.startswith(DEVELOPMENT_PREFIX) else LIMIT


class ClerkApi:
    """A client for one key. It is shared by threads, and must be closed at the end."""

    def __init__(  # noqa: PLR0913 - keywords, each with a default
        self,
        settings: Settings,
        *,
        stopping: StopSignal | None = None,
        limiter: Limiter = nullcontext,
        patience_s: float = PATIENCE_S,
        limited_patience_s: float = LIMITED_PATIENCE_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """`limiter` returns a context manager for the time that a request waits and runs; it may raise.

        `stopping` ends every wait: Stopped is raised. `patience_s` limits the retries of one request,
        `limited_patience_s` those after a 429.

        Waiting for the rate limit, or for the `Retry-After` of a 429, does not count towards `patience_s`. If
        the wait for the rate limit would be longer than both, the request fails at once.
        """
        if settings.clerk_secret_key is None:
            raise SettingsError("CLERK_SECRET_KEY is not set")
        key = settings.clerk_secret_key.get_secret_value()
        self._limiter = limiter
        self._expected_instance_id = settings.clerk_instance_id
        self._sources = FieldSources.of(settings)
        self.stopping = stopping or StopSignal()
        self._patience_s = patience_s
        self._limited_patience_s = limited_patience_s
        self._read_timeout_s = read_timeout_s
        self._rate = RateLimit(rate_limit(settings), PERIOD_S)
        self._idle = threading.Condition()
        self._in_flight = 0
        self._is_closed = False
        self._ahead_ms = 0
        self._http = httpx.Client(
            base_url=f"{settings.clerk_api_url}/v1",
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
            verify=_trusted(),
        )

    def page(self, order_by: str, *, offset: int | None = None, starting_after: str | None = None) -> Page:
        """Return up to MAX_PAGE users, from `offset` on, or after the user `starting_after`."""
        given = {"order_by": order_by, "offset": offset, "starting_after": starting_after}
        return self._users({name: value for name, value in given.items() if value is not None})

    def users(self, clerk_ids: Sequence[str]) -> Page:
        """Return the existing users of up to MAX_IDS ids. A server may ignore the ids and return others."""
        return self._users({"user_id": list(clerk_ids)})

    def user(self, clerk_id: str) -> Page:
        """Return a page with only that user, or an empty page if Clerk has no such user."""
        try:
            answer = self._get(f"/users/{clerk_id}")
        except ClerkRefused as error:
            if error.code == NOT_FOUND:
                return self._page([], self.clock_ms())
            raise
        if not isinstance(answer.body, dict):
            raise unexpected("a user")
        return self._page([answer.body], answer.observed_at)

    def count(self) -> int:
        """Return how many users there are."""
        body = self._get("/users/count").body
        count = body.get("total_count") if isinstance(body, dict) else None
        if not isinstance(count, int):
            raise unexpected("a count")
        return count

    def count_members(self) -> int:
        """Return how many memberships there are."""
        return self._members("/organization_memberships", 0, limit=1).total or 0

    def members(self, offset: int) -> Page:
        """Return up to MAX_PAGE memberships of all users, the oldest first, from `offset` on."""
        return self._members("/organization_memberships", offset, order_by=OLDEST_FIRST)

    def members_of(self, clerk_id: str, offset: int) -> Page:
        """Return up to MAX_PAGE memberships of one user; without `total` if Clerk has no such user."""
        try:
            return self._members(f"/users/{clerk_id}/organization_memberships", offset)
        except ClerkRefused as error:
            if error.code == NOT_FOUND:
                return self._page([], self.clock_ms())
            raise

    @cached_property
    def instance_id(self) -> str | None:
        """The instance that the key belongs to; None if the API does not say. Raises ClerkApiError."""
        try:
            body = self._get("/instance").body
        except ClerkRefused as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise
        id_ = valid_id(body.get("id")) if isinstance(body, dict) else None
        if id_ is None:
            raise unexpected("an instance")
        return id_

    def check_instance(self) -> None:
        """Raise ClerkRefused when CLERK_INSTANCE_ID is set and the key belongs to another instance."""
        expected = self._expected_instance_id
        if expected is not None and is_foreign(self.instance_id, expected):
            raise ClerkRefused("CLERK_SECRET_KEY belongs to another instance than CLERK_INSTANCE_ID names")

    def clock_ms(self) -> int:
        """Return the time (ms): by Clerk's clock, if its last answer shows that this machine's is wrong."""
        return now_ms() - self._ahead_ms

    def close(self) -> None:
        """Close the connections, after the requests in progress."""
        with self._idle:
            self._is_closed = True
            self._idle.wait_for(lambda: self._in_flight == 0, CLOSE_TIMEOUT_S)
        self._http.close()

    def _users(self, parameters: dict[str, Any]) -> Page:
        answer = self._get("/users", {"limit": MAX_PAGE, **parameters})
        if not isinstance(answer.body, list):
            raise unexpected("a list")
        return self._page(answer.body, answer.observed_at)

    def _members(self, path: str, offset: int, **parameters: str | int) -> Page:
        answer = self._get(path, {"limit": MAX_PAGE, "offset": offset, **parameters})
        match answer.body:
            case {"data": list(entries), "total_count": int(total)}:
                missing = "it lacks the id of the membership, of its user or of its organization"
                read = [_read(entry, parse_member, missing) for entry in entries]
                return Page(read, answer.observed_at, total)
        raise unexpected("memberships")

    def _page(self, entries: list[Any], observed_at: int) -> Page:
        parse = partial(parse_user, sources=self._sources)
        return Page([_read(entry, parse, "it has no Clerk id") for entry in entries], observed_at)

    def _get(self, path: str, parameters: dict[str, Any] | None = None) -> ApiResponse:
        patience = _Patience(self._patience_s, self._limited_patience_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ClerkUnavailable),
            wait=_pause,
            stop=patience.is_over,
            sleep=self.stopping.pause,
            reraise=True,
        )
        answer: ApiResponse = retrying(self._attempt, path, parameters, patience)
        return answer

    def _attempt(self, path: str, parameters: dict[str, Any] | None, patience: "_Patience") -> ApiResponse:
        patience.check(self._rate.away_s())  # before the request counts in the shared limit
        with self._limiter():
            turn_in_s = self._rate.delay(patience.left_s)  # long after a 429 to any thread
            patience.check(turn_in_s)
            self.stopping.pause(turn_in_s)
            patience.waited(turn_in_s)
            with self._counted():
                observed_at = now_ms()
                response = self._response(path, parameters)
        ahead_ms = self._ahead_ms = _ahead_ms(response)
        if not response.is_success:
            self._refuse(response)
        return ApiResponse(_decoded(response), observed_at - ahead_ms)

    def _response(self, path: str, parameters: dict[str, Any] | None) -> httpx.Response:
        try:
            with self._http.stream("GET", path, params=parameters) as response:
                content = b"".join(self._in_time(response.iter_raw()))
            return httpx.Response(response.status_code, headers=response.headers, content=content)
        except httpx.RequestError as error:
            raise ClerkUnavailable(
                f"Clerk's API does not answer ({type(error).__name__}): check CLERK_API_URL and the network"
            ) from None

    def _in_time(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the pieces of an answer. Raises ReadTimeout when they take too long together, and Stopped."""
        ends_at = time.monotonic() + ANSWER_TIMEOUTS * self._read_timeout_s
        for piece in pieces:
            self.stopping.pause(0)
            if time.monotonic() > ends_at:
                raise httpx.ReadTimeout("the answer takes too long")
            yield piece

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._idle:
            if self._is_closed:
                raise Stopped("closed")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    def _refuse(self, response: httpx.Response) -> NoReturn:
        status, code = response.status_code, _code(response)
        if status == httpx.codes.TOO_MANY_REQUESTS:
            retry_after_s = _retry_after(response)
            self._rate.pause(retry_after_s)
            raise _limited(retry_after_s)
        if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.REQUEST_TIMEOUT:
            raise ClerkUnavailable(f"Clerk's API fails ({_said(response)}): try again later")
        if code == NO_ORGANIZATIONS:
            raise ClerkRefused(
                "Clerk has no organizations for this instance: enable them, or change ORGANIZATION_SOURCE",
                status,
                code,
            )
        if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise ClerkRefused(
                f"Clerk's API refuses the key ({_said(response)}): check CLERK_SECRET_KEY", status, code
            )
        raise ClerkRefused(
            f"Clerk's API refuses the request ({_said(response)}): check CLERK_API_URL", status, code
        )


class _Patience:
    """Limits the retries of one request: one time limit for errors, another in all after a 429."""

    def __init__(self, trouble_s: float, limited_s: float) -> None:
        self._trouble_s = trouble_s
        self._limited_s = limited_s
        self._waited_s = 0.0
        self._ends_at = time.monotonic() + max(trouble_s, limited_s)

    @property
    def left_s(self) -> float:
        """How many seconds the request may wait for the rate limit."""
        return max(0.0, self._ends_at - time.monotonic())

    def check(self, turn_in_s: float) -> None:
        """Raise ClerkUnavailable if the rate limit requires a longer wait than is left."""
        if turn_in_s > self.left_s:
            raise _limited(turn_in_s)

    def waited(self, seconds: float) -> None:
        """Exclude time in which no error occurred from the limit."""
        self._waited_s += seconds

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        """Say whether no time is left for the next pause and attempt."""
        passed_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
        if _retry_after_of(state) is None:
            return passed_s - self._waited_s > self._trouble_s
        self.waited(state.upcoming_sleep)
        return passed_s > self._limited_s


def _limited(retry_after_s: float) -> ClerkUnavailable:
    seconds = math.ceil(retry_after_s)
    return ClerkUnavailable(f"Clerk's rate limit is exhausted: try again in {seconds} s", retry_after_s)


def _read(entry: Any, parse: Callable[[dict[str, Any]], Entry], missing: str) -> Entry:
    if not isinstance(entry, dict):
        return InvalidEntry("it is no JSON object")
    try:
        return parse(entry)
    except Unreadable:
        return InvalidEntry(missing, valid_id(entry.get("id")))


def _pause(state: tenacity.RetryCallState) -> float:
    retry_after_s = _retry_after_of(state)
    return _BACK_OFF(state) if retry_after_s is None else retry_after_s


def _retry_after_of(state: tenacity.RetryCallState) -> float | None:
    """Return the wait that the last attempt's 429 requests, None if it was no 429."""
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after_s if isinstance(error, ClerkUnavailable) else None


_BACK_OFF = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=MAX_PAUSE_S)


def _decoded(response: httpx.Response) -> Any:
    try:
        return decode(response.content)
    except NotJson:
        kind = response.headers.get("content-type", "").partition(";")[0]
        what = "cut-off JSON" if kind == "application/json" else "something else than JSON"
        raise ClerkUnavailable(f"Clerk's API answered with {what}: check CLERK_API_URL") from None


def _ahead_ms(response: httpx.Response) -> int:
    """Return by how much this machine's clock is ahead of Clerk's; 0 where they agree well enough."""
    try:
        date = parsedate_to_datetime(response.headers.get("date", ""))
    except (ValueError, OverflowError):
        return 0
    ahead_ms = now_ms() - to_ms(date.replace(tzinfo=UTC))
    return ahead_ms if abs(ahead_ms) > CLOCKS_AGREE_MS else 0


def _said(response: httpx.Response) -> str:
    """Return status, Clerk's error code, and the trace id, for which Clerk's support asks."""
    trace_id = _error_body(response).get("clerk_trace_id")
    known = isinstance(trace_id, str) and TRACE_ID.fullmatch(trace_id)
    return " ".join(
        part
        for part in (str(response.status_code), _code(response), f"trace {trace_id}" if known else None)
        if part
    )


def _code(response: httpx.Response) -> str | None:
    match _error_body(response):
        case {"errors": [{"code": str(code)}, *_]} if CODE.fullmatch(code):
            return code
    return None


def _error_body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = decode(response.content)
    except NotJson:
        return {}
    return body if isinstance(body, dict) else {}


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds to wait: what the answer asks for, but never none, or the limit's whole period."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return PERIOD_S
    return max(seconds, MIN_RETRY_AFTER_S) if 0 <= seconds <= MAX_RETRY_AFTER_S else PERIOD_S


@cache
def _trusted() -> ssl.SSLContext:
    """Load the trusted certificates once for all clients of the process: it takes longer than a request.

    Raises SettingsError.
    """
    try:
        return httpx.create_ssl_context()
    except OSError:
        raise SettingsError(
            "the trusted certificates cannot be read: correct or unset SSL_CERT_FILE and SSL_CERT_DIR"
        ) from None
