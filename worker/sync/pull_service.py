"""Pulls users for concurrent callers, within a part of Clerk's rate limit.

All processes together keep within that limit. Two calls for one user are two requests; the merge makes the
second harmless.
"""

import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC
from enum import StrEnum
from typing import Any, NamedTuple

import structlog
from redis.exceptions import RedisError

from config import Settings
from db.connection.engine import Database
from db.connection.errors import DatabaseError
from worker.clerk.api import PERIOD_S, ClerkApi, ClerkApiError, ClerkUnavailable, rate_limit
from worker.redis_client import fail_fast_redis
from worker.sync.context import SyncContext
from worker.sync.pull import Pulled, PullOutcome, pull
from worker.sync.shared_rate_limit import NoTurn, SharedLimit
from worker.threads import in_background

SHARE = 0.5  # of Clerk's rate limit; the application uses the same key
API_PATIENCE_S = 3.0
API_TIMEOUT_S = 4.0
DATABASE_ATTEMPTS = 2
WAIT_S = 8.0  # the longest time until an answer
TURNS = "clerk-sync:pull:turns"

log = structlog.get_logger("worker.sync.pull_service")


class PullStatus(StrEnum):
    """How a call ended."""

    FOUND = "found"
    ABSENT = "absent"
    BUSY = "busy"  # too many calls at once
    UNAVAILABLE = "unavailable"  # Clerk, the database or Redis does not answer


class PullResult(NamedTuple):
    """The status of a call; the row, ready for JSON, if the user was found; else the reason.

    `retry_after_s` is the wait that Clerk requests, if any.
    """

    status: PullStatus
    user: dict[str, Any] | None = None
    reason: str | None = None
    retry_after_s: float | None = None


UNPROVEN = (
    "Clerk knows neither {} nor any other user who is here, so nothing was changed: check CLERK_SECRET_KEY; "
    "if it is right, await the event user.deleted or run clerk-sync pull"
)
ELSEWHERE = "there is no such user at this Clerk instance; the row here is or may be another instance's"
TOO_MANY = PullResult(PullStatus.BUSY, reason="too many users are being pulled")


class PullService:
    """Answers calls for users. Made once per process; it connects with the first call.

    A call is answered within WAIT_S. Its requests may take longer and continue in a thread; there are at most
    as many such threads as connections to the database.
    """

    def __init__(self, settings: Settings) -> None:
        self._redis = fail_fast_redis(settings)
        turns = SharedLimit(self._redis, TURNS, int(rate_limit(settings) * SHARE), PERIOD_S)
        api = ClerkApi(
            settings,
            limiter=turns.turn,  # comes before the process's own limit, so that a call is refused immediately
            patience_s=API_PATIENCE_S,
            limited_patience_s=0,
            read_timeout_s=API_TIMEOUT_S,
        )
        database = Database(settings, attempts=DATABASE_ATTEMPTS)
        self._context = SyncContext(settings, database, api, patience_s=0)
        self._at_once = settings.db_pool_size + settings.db_max_overflow
        self._places = threading.BoundedSemaphore(self._at_once)

    def pull(self, clerk_id: str) -> PullResult:
        """Return the user's row as it is in Clerk now."""
        if not self._places.acquire(blocking=False):
            return TOO_MANY
        try:
            return in_background(self._answer, clerk_id).result(WAIT_S)
        except FutureTimeout:
            return PullResult(PullStatus.UNAVAILABLE, reason="Clerk or the database takes too long")

    def close(self) -> None:
        """Close the connections, once the calls under way have ended or after WAIT_S; later ones are BUSY."""
        until = time.monotonic() + WAIT_S
        for _ in range(self._at_once):
            self._places.acquire(timeout=max(0.0, until - time.monotonic()))
        self._context.api.close()
        self._context.database.dispose()
        self._redis.close()

    def _answer(self, clerk_id: str) -> PullResult:
        try:
            return _result(clerk_id, pull(self._context, clerk_id, confirmed=False))
        except NoTurn:
            return TOO_MANY
        except RedisError as error:
            reason = f"Redis does not answer ({type(error).__name__})"
            return PullResult(PullStatus.UNAVAILABLE, reason=reason)
        except (ClerkApiError, DatabaseError) as error:
            log.warning("pull failed", clerk_id=clerk_id, reason=str(error))
            retry_after_s = error.retry_after_s if isinstance(error, ClerkUnavailable) else None
            return PullResult(PullStatus.UNAVAILABLE, reason=str(error), retry_after_s=retry_after_s)
        finally:
            self._places.release()


def _result(clerk_id: str, pulled: Pulled) -> PullResult:
    if pulled.user is not None:
        return PullResult(PullStatus.FOUND, _to_json(pulled.user))
    kept = {PullOutcome.UNPROVEN: UNPROVEN.format(clerk_id), PullOutcome.ELSEWHERE: ELSEWHERE}
    if pulled.outcome in kept:
        log.error("not deleted", clerk_id=clerk_id, reason=kept[pulled.outcome])
    return PullResult(PullStatus.ABSENT, reason=kept.get(pulled.outcome, "there is no such user"))


def _to_json(user: dict[str, Any]) -> dict[str, Any]:
    moments = {name: user[name] for name in ("created_at", "last_login_at")}
    return user | {name: at and at.astimezone(UTC).isoformat() for name, at in moments.items()}
