"""What the operators' page shows: health, what came lately, what failed; each part as far as it is known."""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from db import ledger
from db.ledger import Activity, LedgerRow
from worker.monitoring.health import Status
from worker.monitoring.probes import Facts, Probe, ProbeResult, ask
from worker.monitoring.user_report import user_report
from worker.queue.failed_jobs import FailedJob, FailedJobs

HOUR = timedelta(hours=1)
EVENTS_SHOWN = 30
HISTORY_SHOWN = 100
FAILED_SHOWN = 50


class Part(NamedTuple):
    """One part of the page: its value, or why it is not known."""

    value: Any
    error: str | None


class Overview(NamedTuple):
    """The page: what /health says, and an Activity, a list of LedgerRow and a list of FailedJob.

    `history` is a UserReport; None when no user was named.
    """

    health: dict[str, Any]
    activity: Part
    newest: Part
    failed: Part
    history: Part | None


class ConsoleData:
    """Asks for all of it side by side. Made once per process; answers within its time limit."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self.failed_jobs = FailedJobs(self._status.redis)
        self._activity = Probe("activity", self._ask_activity)
        self._newest = Probe("newest", self._ask_newest)
        self._history = Probe("history", self._ask_history)
        self._failed = Probe("failed", self._ask_failed)

    def look(self, clerk_id: str | None = None) -> Overview:
        """Return what is known now, and the history of one user if named."""
        probes = {
            **self._status.probes,
            "activity": (self._activity, ()),
            "newest": (self._newest, ()),
            "failed": (self._failed, ()),
        }
        if clerk_id is not None:
            probes["history"] = (self._history, (clerk_id,))
        answers = ask(probes)
        return Overview(
            self._status.report(answers),
            _part(answers["activity"]),
            _part(answers["newest"]),
            _part(answers["failed"]),
            _part(answers["history"]) if clerk_id is not None else None,
        )

    def _ask_activity(self) -> Facts:
        activity: Activity = ledger.activity(self._status.database, datetime.now(UTC) - HOUR)
        return {"value": activity}

    def _ask_newest(self) -> Facts:
        rows: list[LedgerRow] = ledger.recent(self._status.database, limit=EVENTS_SHOWN)
        return {"value": rows}

    def _ask_history(self, clerk_id: str) -> Facts:
        report = user_report(self._status.database, self._status.redis, clerk_id, events=HISTORY_SHOWN)
        return {"value": report}

    def _ask_failed(self) -> Facts:
        jobs: list[FailedJob] = list(self.failed_jobs.newest(limit=FAILED_SHOWN))
        return {"value": jobs}


def _part(answer: ProbeResult) -> Part:
    return Part(answer.facts.get("value"), answer.error)
