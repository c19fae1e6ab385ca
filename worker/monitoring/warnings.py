"""The warnings for operators: each function yields its warnings for the given facts.

`alarms` make the service degraded, `remarks` do not.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from worker.monitoring.probes import Facts
from worker.monitoring.receivers import SILENT_AFTER_S
from worker.monitoring.recent import MINUTE_S, MISMATCH, STALE, WINDOW_MINUTES, Recent
from worker.monitoring.words import ago, counted, span
from worker.sync.last_run import Result

STUCK_AFTER_S = 30
A_FEW = 5
CLOCKS_APART = timedelta(minutes=1)
# A receiver accepts a delivery only if its clock and Svix's are at most 5 minutes apart.
RECEIVERS_APART = timedelta(minutes=10)
LOSS_IS_SAID_FOR = timedelta(hours=1)
OVERDUE = 5  # if so many genuine deliveries were due and none came, it is no coincidence
AT_LEAST_S = 10


def alarms(facts: Facts) -> dict[str, list[str]]:
    """Return why the service is degraded: the warnings by cause. The causes are labels of a metric.

    `facts` are those of every probe, the Settings as `settings`, and the last scheduled reconciliation's
    summary as `reconciliation_summary`.
    """
    found = {cause: list(say(facts)) for cause, say in ALARMS.items()}
    return {cause: words for cause, words in found.items() if words}


def remarks(facts: Facts) -> list[str]:
    """Return the warnings that do not degrade."""
    return [words for say in REMARKS for words in say(facts)]


def _silence(facts: Facts) -> Iterator[str]:
    """Warn of too long a time since the last delivery or, without any, since the first probe."""
    since = facts.get("last_received_at") or facts.get("watching_since")
    limit = facts["settings"].silence_alarm_minutes
    if limit is None or since is None:
        return
    minutes = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() / 60
    if minutes >= limit:
        yield f"no delivery for {counted(round(minutes), 'minute')}: see the endpoint in Clerk's dashboard"


def _queue_full(facts: Facts) -> Iterator[str]:
    if "queue" in facts and facts["queue"]["depth"] >= facts["settings"].max_queue_depth:
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
            f"a worker has been processing the same batch for {max(ages):.0f} s: clerk-sync db locks shows"
            " what it waits for (docs/operations.md, A row is locked)"
        )


def _locked(facts: Facts) -> Iterator[str]:
    waits = facts.get("lock_waits")
    if waits is not None and waits.longest_s > STUCK_AFTER_S:
        waited = counted(waits.jobs, "delivery has waited", "deliveries have waited up to")
        yield (
            f"{waited} {waits.longest_s:.0f} s for a row that another transaction has locked:"
            " clerk-sync db locks shows that transaction and can end it"
            " (docs/operations.md, A row is locked)"
        )


def _refused_again(facts: Facts) -> Iterator[str]:
    waits = facts.get("retries")
    if waits is not None and waits.jobs:
        who = counted(waits.jobs, "delivery was", "deliveries were")
        yield (
            f"{who} refused more than once, and will be tried again: {waits.reason}"
            " (docs/operations.md, Jobs fail)"
        )


def _failed(facts: Facts) -> Iterator[str]:
    failed = facts.get("queue", {}).get("failed")
    if failed:
        newest = facts.get("newest_failure")
        reason = f", the newest because of {newest}" if newest else ""
        yield (
            f"{counted(failed, 'job has', 'jobs have')} failed{reason}:"
            " see clerk-sync failed list (docs/operations.md, Jobs fail)"
        )


def _signatures(facts: Facts) -> Iterator[str]:
    """Warn of refused deliveries. If most deliveries are genuine, the refused ones count as forged.

    The time since the last genuine one distinguishes a wrong secret or clock from forgeries.
    Of two reasons, one that is over is left out.
    """
    recent = facts.get("recent")
    if recent is None or not _is_refusing(recent):
        return
    age_s = recent.genuine_age_s
    last = "" if age_s is None else f", the last {span(max(1, age_s))} ago"
    genuine = f"({counted(recent.genuine, 'genuine one')} came{last})"
    is_going_on = any(recent.since_genuine.values())
    if recent.mismatch > A_FEW and (recent.since_genuine[MISMATCH] or not is_going_on):
        yield (
            f"{counted(recent.mismatch, 'delivery', 'deliveries')} refused in the last"
            f" {WINDOW_MINUTES} minutes because the signature does not match {genuine}: compare"
            " CLERK_WEBHOOK_SIGNING_SECRET with the endpoint's Signing Secret"
        )
    if recent.stale > A_FEW and (recent.since_genuine[STALE] or not is_going_on):
        yield (
            f"{counted(recent.stale, 'delivery', 'deliveries')} refused in the last {WINDOW_MINUTES} minutes"
            f" because the signed time is more than five minutes off {genuine}: set the clock of the"
            " receiver's machine"
        )


def _is_refusing(recent: Recent) -> bool:
    if max(recent.mismatch, recent.stale) <= A_FEW or recent.is_over:
        return False
    return recent.mismatch + recent.stale > recent.genuine or _genuine_ones_stopped(recent)


def _genuine_ones_stopped(recent: Recent) -> bool:
    """Whether refused deliveries came instead of genuine ones that were due, at the rate of the window."""
    if recent.genuine_age_s is None or recent.genuine_age_s < AT_LEAST_S:
        return False
    due = recent.genuine * recent.genuine_age_s / (WINDOW_MINUTES * MINUTE_S)
    return due >= OVERDUE and sum(recent.since_genuine.values()) > A_FEW


def _forgeries(facts: Facts) -> Iterator[str]:
    recent = facts.get("recent")
    if recent is None or recent.mismatch + recent.stale <= A_FEW or _is_refusing(recent):
        return
    yield (
        f"{counted(recent.mismatch + recent.stale, 'delivery', 'deliveries')} with a wrong signature or time"
        f" refused in the last {WINDOW_MINUTES} minutes, beside {counted(recent.genuine, 'genuine one')}:"
        " forgeries, a second endpoint's, or those of a fault that is over"
        " (docs/operations.md, Signature errors)"
    )


def _foreign(facts: Facts) -> Iterator[str]:
    recent = facts.get("recent")
    if recent is not None and recent.foreign:
        yield (
            f"{counted(recent.foreign, 'delivery', 'deliveries')} of another Clerk instance ignored in the"
            f" last {WINDOW_MINUTES} minutes: correct CLERK_INSTANCE_ID, or the URL of that endpoint"
        )


def _second_instance(facts: Facts) -> Iterator[str]:
    found = facts.get("instances", ())
    if len(found) > 1:
        yield (
            f"{len(found)} Clerk instances have written to these tables: use a separate schema for each and"
            " set CLERK_INSTANCE_ID, or remove the rows of an example from Clerk's dashboard"
            " (docs/operations.md, Several Clerk instances)"
        )


def _no_receiver(facts: Facts) -> Iterator[str]:
    """Warn unless deliveries arrive: an emptied Redis knows no receiver until its next heartbeat."""
    last = facts.get("last_received_at")
    silence = timedelta(seconds=SILENT_AFTER_S)
    if last is not None and datetime.now(UTC) - datetime.fromisoformat(last) < silence:
        return
    if facts.get("receivers", {}).get("alive") == 0:
        yield "no receiver is alive: deliveries are refused (start clerk-sync web)"


def _redis_lost_data(facts: Facts) -> Iterator[str]:
    """Warn if the ledger has a newer delivery than Redis, or, lately, one older than the data in Redis."""
    known, oldest = facts.get("ledger_received_at"), facts.get("ledger_began_at")
    if known is None or oldest is None or "watching_since" not in facts:
        return
    last, since = facts["last_received_at"], datetime.fromisoformat(facts["watching_since"])
    is_old = last is None or datetime.fromisoformat(last) < known - RECEIVERS_APART
    is_new = oldest < since - RECEIVERS_APART and datetime.now(UTC) - since < LOSS_IS_SAID_FOR
    if is_old or is_new:
        when = f" {ago(facts['watching_since'], datetime.now(UTC))}" if is_new else ""
        yield (
            f"Redis was emptied, or lost data{when}: what waited there is lost"
            " (docs/operations.md, Redis lost)"
        )


def _two_databases(facts: Facts) -> Iterator[str]:
    if facts.get("applied_here") is False:
        yield (
            "the newest delivery that was applied is not in the ledger: this database was reset or restored,"
            " or a worker uses another DATABASE_URL or DATABASE_SCHEMA (docs/operations.md, Two databases)"
        )
    if facts.get("same_tables") is False:
        yield (
            "DATABASE_URL and DATABASE_URL_UNPOOLED lead to different tables:"
            " set both to the same database and schema"
        )


def _migrations_url(facts: Facts) -> Iterator[str]:
    if facts.get("migrations_error"):
        yield f"migrations cannot run: {facts['migrations_error']}"


def _clock(facts: Facts) -> Iterator[str]:
    ahead_s = facts.get("clock_ahead_s", 0.0)
    if abs(ahead_s) > CLOCKS_APART.total_seconds():
        way = "ahead of" if ahead_s > 0 else "behind"
        yield f"this machine's clock is {abs(ahead_s):,.0f} s {way} the database's: set it (timedatectl)"


def _reconciliation_failed(facts: Facts) -> Iterator[str]:
    last = facts["reconciliation_summary"]
    if last is None:
        return
    if last["result"] is Result.FAILED:
        yield f"the last reconciliation failed: {last['reason']}"
    if last["overdue"]:
        yield (
            "no reconciliation has ended for three times RECONCILE_EVERY:"
            " start a worker, or raise RECONCILE_EVERY"
        )


def _drift(facts: Facts) -> Iterator[str]:
    last = facts["reconciliation_summary"]
    if last is None or last["differing"] is None:
        return
    if last["reason"]:
        yield f"the last reconciliation was refused: {last['reason']}"
    elif last["differing"]:
        who = counted(last["differing"], "user differs", "users differ")
        yield f"{who} from Clerk: see clerk-sync reconcile"


def _evicts(facts: Facts) -> Iterator[str]:
    if facts.get("evicts"):
        yield "Redis may evict keys, jobs included, when it is full: set maxmemory-policy noeviction"


def _no_append_only_file(facts: Facts) -> Iterator[str]:
    if facts.get("append_only") is False:
        yield "Redis keeps no append-only file: if it crashes, the queue is lost (set appendonly yes)"


Say = Callable[[Facts], Iterator[str]]
ALARMS: dict[str, Say] = {
    "silence": _silence,
    "queue_full": _queue_full,
    "no_worker": _no_worker,
    "suspended": _suspended,
    "workers_wait": _all_wait,
    "batch_stuck": _stuck,
    "locked": _locked,
    "retries": _refused_again,
    "failed_jobs": _failed,
    "signatures": _signatures,
    "foreign_instance": _foreign,
    "second_instance": _second_instance,
    "no_receiver": _no_receiver,
    "redis_lost_data": _redis_lost_data,
    "two_databases": _two_databases,
    "clock": _clock,
    "reconciliation": _reconciliation_failed,
}
# Causes that Redis alone does not show: /metrics takes them from the last report.
NEED_A_REPORT = ("second_instance", "redis_lost_data", "two_databases", "clock", "reconciliation")
REMARKS: tuple[Say, ...] = (_forgeries, _migrations_url, _drift, _no_append_only_file, _evicts)
