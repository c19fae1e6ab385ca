"""What an operator must act on, in words: each function says one thing of the facts, or nothing.

`alarms` make the service degraded, `remarks` do not.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain

from config import Settings
from worker.monitoring.probes import Facts
from worker.sync.last_run import Result

STUCK_AFTER_S = 30


def alarms(settings: Settings, facts: Facts, repair: Facts | None) -> list[str]:
    """Return why the service is degraded. `repair` is the summary of the last scheduled reconciliation."""
    return list(
        chain(
            _silence(settings, facts),
            _queue_full(settings, facts),
            _no_worker(facts),
            _suspended(facts),
            _all_wait(facts),
            _stuck(facts),
            _repair_failed(repair),
        )
    )


def remarks(facts: Facts, repair: Facts | None) -> list[str]:
    """Return what an operator should look at, though the service does its work."""
    return list(chain(_drift(repair), _no_append_only_file(facts), _evicts(facts)))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the singular or the plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _silence(settings: Settings, facts: Facts) -> Iterator[str]:
    """Silence counts from the last delivery; where there was none, from the first probe."""
    since = facts.get("last_received_at") or facts.get("watching_since")
    limit = settings.silence_alarm_minutes
    if limit is None or since is None:
        return
    minutes = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() / 60
    if minutes >= limit:
        yield f"no delivery for {counted(round(minutes), 'minute')}: see the endpoint in Clerk's dashboard"


def _queue_full(settings: Settings, facts: Facts) -> Iterator[str]:
    if "queue" in facts and facts["queue"]["depth"] >= settings.max_queue_depth:
        yield "the queue is full (MAX_QUEUE_DEPTH): deliveries are refused until workers have caught up"


def _no_worker(facts: Facts) -> Iterator[str]:
    if facts.get("workers", {}).get("alive") == 0:
        yield "no worker is alive: deliveries wait in the queue (start clerk-sync worker)"


def _suspended(facts: Facts) -> Iterator[str]:
    if facts.get("suspended"):
        yield 'the workers are suspended: rq resume --url "$REDIS_URL"'


def _all_wait(facts: Facts) -> Iterator[str]:
    workers = facts.get("workers", {}).get("list", ())
    if not workers or not all(worker["waiting_for"] for worker in workers):
        return
    waiting = sorted({(worker["waiting_for"], worker["reason"] or "") for worker in workers})
    for dependency, reason in waiting:
        who = "the worker is" if len(workers) == 1 else "all workers are"
        if len(waiting) > 1:
            who = "a worker is"
        name = "Redis" if dependency == "Redis" else "the database"
        yield f"{who} waiting for {name}: {reason}" if reason else f"{who} waiting for {name}"


def _stuck(facts: Facts) -> Iterator[str]:
    ages = [worker["in_hand_s"] or 0 for worker in facts.get("workers", {}).get("list", ())]
    if ages and max(ages) > STUCK_AFTER_S:
        yield (
            f"a worker has had the same batch in hand for {max(ages):.0f} s:"
            " a transaction may hold what it needs (docs/operations.md, Lag grows)"
        )


def _repair_failed(repair: Facts | None) -> Iterator[str]:
    if repair is None:
        return
    if repair["result"] is Result.FAILED:
        yield f"the last repair failed: {repair['reason']}"
    if repair["overdue"]:
        yield "no repair has ended for three times RECONCILE_EVERY: start a worker, or give it more time"


def _drift(repair: Facts | None) -> Iterator[str]:
    if repair is None or repair["differing"] is None:
        return
    if repair["reason"]:
        yield f"the last repair proves nothing: {repair['reason']}"
    elif repair["differing"]:
        who = "1 user differs" if repair["differing"] == 1 else f"{repair['differing']:,} users differ"
        yield f"{who} from Clerk: see clerk-sync reconcile"


def _evicts(facts: Facts) -> Iterator[str]:
    if facts.get("evicts"):
        yield "Redis may evict keys when it is full, jobs too: set maxmemory-policy noeviction"


def _no_append_only_file(facts: Facts) -> Iterator[str]:
    if facts.get("append_only") is False:
        yield "Redis keeps no append-only file: what waits is lost when it crashes (set appendonly yes)"
