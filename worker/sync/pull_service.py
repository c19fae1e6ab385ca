"""Users pulled for many callers at once, under a part of Clerk's rate limit."""

import json
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, suppress
from datetime import UTC
from enum import StrEnum
from typing import Any, NamedTuple, cast

import structlog
from redis import Redis
from redis.exceptions import LockError, RedisError
from redis.lock import Lock

from config import Settings
from db.connection.engine import Database
from db.connection.errors import DatabaseError
from db.drift.users import FoundUser
from db.merge.policy import Policy
from worker.clerk.api import PERIOD_S, ClerkApi, ClerkApiError, ClerkUnavailable
from worker.clerk.payloads import CLERK_ID
from worker.redis_client import fail_fast_redis
from worker.shutdown import StopSignal
from worker.sync.context import SyncContext
from worker.sync.pull import PullOutcome, pull
from worker.sync.shared_rate_limit import NoTurn, SharedLimit
from worker.sync.writer import ChangeWriter
from worker.threads import in_background

SHARE = 0.5  # of Clerk's rate limit; the application uses the same key
API_PATIENCE_S = 3.0
API_TIMEOUT_S = 4.0
DATABASE_ATTEMPTS = 2
ANSWER_TTL_MS = 1000
LOCK_S = 30.0
WAIT_S = 8.0  # and no longer, whatever hangs
LOOK_EVERY_S = 0.05
PREFIX = "clerk-sync:pull:"

log = structlog.get_logger("worker.sync.pull_service")


class PullStatus(StrEnum):
    """How a call at the desk ended."""

    FOUND = "found"
    ABSENT = "absent"
    BUSY = "busy"  # too many calls at once
    UNAVAILABLE = "unavailable"  # Clerk, the database or Redis does not answer


class PullResult(NamedTuple):
    """A verdict; the row, ready for JSON, when the user was found; else a sentence that says why not.

    `retry_after_s` is how long Clerk asks to be left alone, where it does.
    """

    verdict: PullStatus
    user: dict[str, Any] | None = None
    reason: str | None = None
    retry_after_s: float | None = None


UNPROVEN = (
    "Clerk knows neither {} nor any other user who is here, so nothing was changed: check CLERK_SECRET_KEY; "
    "if it is right, await the event user.deleted or run clerk-sync pull"
)
ELSEWHERE = "there is no such user at this Clerk instance; the row here is or may be another instance's"
TOO_MANY = PullResult(PullStatus.BUSY, reason="too many users are being pulled")


class SharingApi(ClerkApi):
    """A client for the desks of all processes, whose requests together leave a part of Clerk's rate limit.

    Every request counts, each time it is sent. Its methods raise NoTurn as well, and redis.RedisError.
    """

    def __init__(self, settings: Settings, redis: Redis) -> None:
        super().__init__(
            settings, patience_s=API_PATIENCE_S, limited_patience_s=0, read_timeout_s=API_TIMEOUT_S
        )
        self._turns = SharedLimit(redis, f"{PREFIX}turns", int(self.limit * SHARE), PERIOD_S)

    def _shared_turn(self) -> AbstractContextManager[None]:
        return self._turns.turn()  # before the wait for one of this process: who gets none is told at once


class PullService:
    """Answers calls for users. Made once in a process; it connects when the first call comes.

    A call is answered within WAIT_S. What it waits for may hang for longer, and goes on in a thread of its
    own: no more of them than there may be connections to the database.
    """

    def __init__(self, settings: Settings) -> None:
        stopping = StopSignal()
        self._redis = fail_fast_redis(settings)
        api = SharingApi(settings, self._redis)
        database = Database(settings, attempts=DATABASE_ATTEMPTS)
        store = ChangeWriter(database, Policy.of(settings), stopping, lambda: api.instance_id, patience_s=0)
        self._bridge = SyncContext(settings, api, store, stopping)
        self._places = threading.BoundedSemaphore(settings.db_pool_size + settings.db_max_overflow)

    def pull(self, clerk_id: str) -> PullResult:
        """Return the user's row as it is in Clerk now, or was a second ago at most."""
        if not CLERK_ID.fullmatch(clerk_id):
            return PullResult(PullStatus.ABSENT, reason="that is no Clerk id")
        deadline = time.monotonic() + WAIT_S
        try:
            while time.monotonic() < deadline:
                answer = self._known_answer(clerk_id) or self._first_answer(clerk_id, deadline)
                if answer is not None:
                    return answer
                time.sleep(LOOK_EVERY_S)
        except RedisError as error:
            return PullResult(
                PullStatus.UNAVAILABLE, reason=f"Redis does not answer ({type(error).__name__})"
            )
        return PullResult(PullStatus.UNAVAILABLE, reason="another call for this user takes too long")

    def close(self) -> None:
        """Close the connections."""
        self._bridge.api.close()
        self._bridge.database.dispose()
        self._redis.close()

    def _known_answer(self, clerk_id: str) -> PullResult | None:
        """Return what a call for that user was just answered."""
        kept = cast("bytes | None", self._redis.get(f"{PREFIX}answer:{clerk_id}"))
        if kept is None:
            return None
        verdict, *rest = json.loads(kept)
        return PullResult(PullStatus(verdict), *rest)

    def _first_answer(self, clerk_id: str, deadline: float) -> PullResult | None:
        """Have Clerk asked; None when somebody else is at it."""
        lock = self._redis.lock(f"{PREFIX}lock:{clerk_id}", timeout=LOCK_S, thread_local=False)
        if not lock.acquire(blocking=False):
            return None
        if not self._places.acquire(blocking=False):
            _release(lock)
            return TOO_MANY
        asked = in_background(self._answer, clerk_id, lock)
        try:
            return asked.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            return PullResult(PullStatus.UNAVAILABLE, reason="Clerk or the database takes too long")

    def _answer(self, clerk_id: str, lock: Lock) -> PullResult:
        """Ask Clerk, and keep the answer for all who wait for it."""
        try:
            answer = self._known_answer(clerk_id)
            if answer is None:
                answer = self._ask(clerk_id)
                self._redis.set(f"{PREFIX}answer:{clerk_id}", json.dumps(answer), px=ANSWER_TTL_MS)
            return answer
        finally:
            self._places.release()
            _release(lock)

    def _ask(self, clerk_id: str) -> PullResult:
        try:
            pulled = pull(self._bridge, clerk_id, confirmed=False)
        except NoTurn:
            return TOO_MANY
        except (ClerkApiError, DatabaseError) as error:
            log.warning("pull failed", clerk_id=clerk_id, reason=str(error))
            return PullResult(
                PullStatus.UNAVAILABLE,
                reason=str(error),
                retry_after_s=error.retry_after_s if isinstance(error, ClerkUnavailable) else None,
            )
        if pulled.outcome is PullOutcome.UNPROVEN:
            reason = UNPROVEN.format(clerk_id)
            log.error("nobody was deleted", clerk_id=clerk_id, reason=reason)
            return PullResult(PullStatus.ABSENT, reason=reason)
        if pulled.outcome is PullOutcome.ELSEWHERE:
            log.error("not deleted", clerk_id=clerk_id, reason=ELSEWHERE)
            return PullResult(PullStatus.ABSENT, reason=ELSEWHERE)
        if pulled.user is None:
            return PullResult(PullStatus.ABSENT, reason="there is no such user")
        return PullResult(PullStatus.FOUND, _plain(pulled.user))


def _release(lock: Lock) -> None:
    with suppress(LockError):  # it took longer than the lock lives
        lock.release()


def _plain(user: FoundUser) -> dict[str, Any]:
    login_at = user.last_login_at
    return {
        **user._asdict(),
        "created_at": user.created_at.astimezone(UTC).isoformat(),
        "last_login_at": login_at and login_at.astimezone(UTC).isoformat(),
    }
