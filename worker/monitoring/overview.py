"""The data of the console: health, recent deliveries, failed jobs; each part as far as it is known."""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from db import ledger
from worker.monitoring.health import Status
from worker.monitoring.probes import Probe, ask
from worker.monitoring.user_report import user_report
from worker.queue.failed_jobs import FailedJobs

HOUR = timedelta(hours=1)
EVENTS_SHOWN = 30
HISTORY_SHOWN = 100
FAILED_SHOWN = 50


class Part(NamedTuple):
    """One part of the page: its value, or the reason why it is unknown."""

    value: Any
    error: str | None


class Overview(NamedTuple):
    """The page: the report of /health, an Activity, a list of LedgerRow and a list of FailedJob.

    `history` is a UserReport; None if no user was named.
    """

    health: dict[str, Any]
    activity: Part
    newest: Part
    failed: Part
    history: Part | None


class ConsoleData:
    """Reads all parts in parallel, within a time limit. Made once per process."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self.failed_jobs = FailedJobs(status.redis)
        database = status.database
        self._probes = (
            Probe("activity", lambda: {"value": ledger.activity(database, datetime.now(UTC) - HOUR)}),
            Probe("newest", lambda: {"value": ledger.recent(database, limit=EVENTS_SHOWN)}),
            Probe("failed", lambda: {"value": list(self.failed_jobs.newest(limit=FAILED_SHOWN))}),
        )
        self._history = Probe(
            "history",
            lambda of: {"value": user_report(database, status.redis, of, events=HISTORY_SHOWN)},
        )

    def look(self, clerk_id: str | None = None) -> Overview:
        """Return the current data, with the history of one user if named."""
        probes = [*self._status.probes, *self._probes]
        answers = ask(*probes) if clerk_id is None else ask(*probes, self._history, history=clerk_id)
        parts = {name: Part(answer.facts.get("value"), answer.error) for name, answer in answers.items()}
        return Overview(
            self._status.report(answers),
            parts["activity"],
            parts["newest"],
            parts["failed"],
            parts.get("history"),
        )
