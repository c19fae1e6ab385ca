"""Everything stored about one user: tables, ledger and jobs; for support, and before an erasure."""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError

from db import ledger
from db.connection.engine import Database
from db.ledger import LedgerFilter, LedgerRow
from db.merge.change import PLACEHOLDER_DOMAIN
from db.user_record import UserRecord, user_record
from worker.queue.rq_format import RESULT_TTL_S
from worker.queue.user_jobs import UserJobs, user_jobs
from worker.redis_causes import explain
from worker.redis_client import QueueUnavailable

EVENTS_SHOWN = 20
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class UserReport(NamedTuple):
    """Everything stored about one user; if Redis does not answer, `jobs` is None, and `jobs_error` set."""

    record: UserRecord
    events: list[LedgerRow]
    jobs: UserJobs | None
    jobs_error: str | None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored."""
        rows = (self.record.row, self.record.sync, self.record.profile)
        jobs = self.jobs.jobs if self.jobs else []
        return not any(rows) and not (self.record.memberships or self.events or jobs)

    @property
    def address(self) -> str:
        """What kind of address the row has, without the address."""
        record = self.record
        if record.row is None:
            return "no row"
        if not record.row["email"].endswith(f"@{PLACEHOLDER_DOMAIN}"):
            return "the address that the user claims"
        if record.sync and record.sync["claimed_email"]:
            return "a placeholder: another user has the address that this one claims"
        return "a placeholder: the user claims no address"

    @property
    def bodies_until(self) -> datetime:
        """When Redis will have deleted the bodies of all applied deliveries (finished jobs)."""
        kept = timedelta(seconds=RESULT_TTL_S)
        return max((row.applied_at + kept for row in self.events), default=LONG_AGO)

    def as_json(self) -> dict[str, Any]:
        """Return the report for JSON, `clerk_id` first."""
        return {
            **self.record._asdict(),
            "events": [row._asdict() for row in self.events],
            "jobs": None if self.jobs is None else [job._asdict() for job in self.jobs.jobs],
            "jobs_complete": self.jobs is not None and self.jobs.is_complete,
            "bodies_until": self.bodies_until if self.events else None,
        }


def user_report(database: Database, redis: Redis, clerk_id: str, events: int = EVENTS_SHOWN) -> UserReport:
    """Return everything stored about one user. Raises DatabaseError."""
    record = user_record(database, clerk_id)
    rows = ledger.recent(database, LedgerFilter(clerk_id=clerk_id), limit=events)
    try:
        return UserReport(record, rows, user_jobs(redis, clerk_id), None)
    except RedisError as error:
        return UserReport(record, rows, None, explain(error))
    except QueueUnavailable as error:
        return UserReport(record, rows, None, str(error))
