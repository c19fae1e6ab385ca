"""The report of `/health` and `status`: the answers of the probes, and the overall status."""

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from config import Settings
from db import identity, instances, ledger, schema
from db.connection.engine import Database
from db.connection.errors import DatabaseError
from worker.monitoring import warnings
from worker.monitoring.probes import Facts, Probe, ProbeFailed, ProbeResult, ask
from worker.monitoring.redis_stats import CAUSES_KEY, redis_facts
from worker.monitoring.words import iso
from worker.queue import rq_format as rq
from worker.queue.description import subject
from worker.redis_client import fail_fast_redis
from worker.sync import last_run

ANSWER_LIMIT_S = 10.0  # of PostgreSQL: an answer later than probes.LIMIT_S is shown in the next report
RECHECK_S = 20.0
CAUSES_TTL_S = 300

CHECKS = ("redis", "database", "schema")  # those that decide whether the service is failing
_UNKNOWN_QUEUE = dict.fromkeys(("depth", "oldest_age_s", "reserved", "started", "scheduled", "failed"))
_UNKNOWN_WORKERS: Facts = {"alive": None, "last_seen_at": None, "list": []}


class Status:
    """Checks Redis and the database. Made once per process; `report` answers within probes.LIMIT_S."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = datetime.now(UTC)
        self.redis = fail_fast_redis(settings)
        # Two attempts and a time limit, because idle connections may be broken by now.
        self.database = Database(settings, attempts=2, answer_limit_s=ANSWER_LIMIT_S)
        # What has to be asked for a report; other probes can be asked at the same time.
        self.probes = [
            Probe("redis", lambda: _writable(redis_facts(self.redis))),
            Probe("database", lambda: database_facts(self.database)),
            Probe(
                "schema", lambda: {**schema_facts(self.database), **applied_facts(self.redis, self.database)}
            ),
        ]
        if settings.database_url_unpooled not in {None, settings.database_url}:
            self.probes.append(Probe("migrations", MigrationsUrl(settings, self.database).facts))

    def report(self, answers: Mapping[str, ProbeResult] | None = None) -> dict[str, Any]:
        """Return the current report, ready for JSON; `answers` are those of the probes, if already run.

        `status` is "failing" when a check fails, "degraded" when something keeps deliveries from being
        received or applied (`warnings` names it), else "ok". Some `warnings` do not degrade. `reconciliation`
        is present if RECONCILE_EVERY is set.
        """
        answers = ask(*self.probes) if answers is None else answers
        facts = {key: value for answer in answers.values() for key, value in answer.facts.items()}
        checks = {
            name: {"ok": answers[name].error is None, "ms": answers[name].ms, "error": answers[name].error}
            for name in CHECKS
        }
        pool, waits = self.database.pool_state(), facts.get("lock_waits")
        last = self._reconciliation(facts)
        facts |= {"settings": self._settings, "reconciliation_summary": last}
        alarms = warnings.alarms(facts)
        if answers["redis"].error is None:
            is_known = all(answers[probe.name].error is None for probe in self.probes)
            self._keep(alarms if is_known else [*alarms, *facts["causes"]])
        if not all(check["ok"] for check in checks.values()):
            status = "failing"
        else:
            status = "degraded" if alarms else "ok"
        report = {
            "status": status,
            "warnings": [*chain(*alarms.values()), *warnings.remarks(facts)],
            "checks": checks,
            "schema": facts.get("schema"),
            "pool": {"size": pool.size, "in_use": pool.in_use, "overflow": pool.overflow},
            "queue": facts.get("queue", _UNKNOWN_QUEUE),
            "lock_waits": {
                "jobs": waits.jobs if waits else None,
                "since": iso(waits.since) if waits and waits.since else None,
            },
            "receivers": facts.get("receivers", {"alive": None, "last_seen_at": None}),
            "workers": facts.get("workers", _UNKNOWN_WORKERS),
            "last_received_at": facts.get("last_received_at"),
            "last_applied_at": facts.get("last_applied_at"),
        }
        return report if self._settings.reconcile_every is None else report | {"reconciliation": last}

    def _keep(self, found: Collection[str]) -> None:
        """Keep the causes that /metrics, which does not ask the database, cannot find."""
        causes = [cause for cause in warnings.NEED_A_REPORT if cause in found]
        with suppress(RedisError):
            self.redis.set(CAUSES_KEY, json.dumps(causes), ex=CAUSES_TTL_S)

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()
        self.database.dispose()

    def _reconciliation(self, facts: Facts) -> dict[str, Any] | None:
        """Return the last reconciliation's summary, None if none is scheduled or Redis does not answer."""
        every_s = self._settings.reconcile_every
        if every_s is None or "reconciliation" not in facts:
            return None
        return last_run.summary(facts["reconciliation"], every_s, self._began)


class MigrationsUrl:
    """Checks whether DATABASE_URL_UNPOOLED leads to the tables of DATABASE_URL.

    Each check opens a connection, so a positive result is kept for RECHECK_S.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._unpooled = Database(settings, unpooled=True, attempts=1)
        self._facts: Facts = {}
        self._checked_at = -RECHECK_S

    def facts(self) -> Facts:
        """Return `same_tables`; if it is unknown, the reason as `migrations_error`."""
        if time.monotonic() >= self._checked_at + RECHECK_S:
            self._facts = self._check()
            if self._facts.get("same_tables"):
                self._checked_at = time.monotonic()
        return self._facts

    def _check(self) -> Facts:
        try:
            self._unpooled.ping()
        except DatabaseError as error:
            return {"migrations_error": str(error)}
        try:
            return {"same_tables": identity.leads_to_same_tables(self._unpooled, self._database)}
        except DatabaseError:  # the check of the database reports it
            return {}
        finally:
            self._unpooled.dispose()  # an idle connection would occupy one of the few


def _writable(facts: Facts) -> Facts:
    """Return the facts about Redis. Raises ProbeFailed if it answers, but refuses writes."""
    if facts["refusal"]:
        raise ProbeFailed(f"{facts['refusal']}; until then deliveries are refused", facts)
    return facts


def database_facts(database: Database) -> Facts:
    """Return how many seconds this machine's clock is ahead of the database's. Raises DatabaseError."""
    database.ping()
    before = time.time()
    theirs = identity.clock(database).timestamp()
    return {"clock_ahead_s": (before + time.time()) / 2 - theirs}


def schema_facts(database: Database) -> Facts:
    """Return the schema's state, and when the newest deliveries were applied and received.

    Raises ProbeFailed, DatabaseError.
    """
    state = schema.state(database)
    if state.trouble:
        raise ProbeFailed(state.trouble)
    applied_at, received_at, began_at = ledger.ends(database)
    return {
        "schema": state.value,
        "last_applied_at": iso(applied_at) if applied_at else None,
        "ledger_received_at": received_at,
        "ledger_began_at": began_at,
        "instances": instances.seen(database),
    }


def applied_facts(redis: Redis, database: Database) -> Facts:
    """Return whether the newest delivery that was applied is in this database. Raises DatabaseError."""
    try:
        newest: Any = redis.zrange(rq.FINISHED_KEY, 0, 0, desc=True)
        id_ = newest[0].decode() if newest else ""
        description: Any = redis.hget(rq.JOB_PREFIX + id_, "description")
        if subject(description)[0] is None:  # a job of another program
            return {}
    except (RedisError, UnicodeDecodeError):
        return {}
    return {"applied_here": ledger.has(database, id_)}
