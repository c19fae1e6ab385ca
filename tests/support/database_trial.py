"""A real database to deliver histories to, again and again, and the count of what was tried."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest

import config
from db.apply import users
from db.connection.engine import Database
from db.merge.policy import Policy
from tests.support.histories import BatchPlan
from tests.support.payloads import body
from tests.support.reference_model import (
    Choices,
    Company,
    ExpectedTables,
    Row,
    SentEvent,
    Stay,
    as_json,
    cleaned,
    subject,
)
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming

PATIENCE_S = 60
WORKERS = 4
RESET = """
    DELETE FROM users; DELETE FROM user_sync; DELETE FROM webhook_events;
    DELETE FROM membership_sync; DELETE FROM organization_sync; DELETE FROM instance_sync;
    DELETE FROM user_profiles
"""
READ_USERS = """
    SELECT clerk_id, email, name, organization, role,
           (extract(epoch FROM created_at) * 1000)::bigint, (extract(epoch FROM last_login_at) * 1000)::bigint
    FROM users
"""
READ_SYNC = """
    SELECT clerk_id, claimed_email, (extract(epoch FROM last_login_at) * 1000)::bigint,
           (extract(epoch FROM deleted_at) * 1000)::bigint, instance_seen_at, instance_id
    FROM user_sync
"""
READ_MEMBERSHIPS = """
    SELECT clerk_id, id, organization_id, (extract(epoch FROM joined_at) * 1000)::bigint,
           (extract(epoch FROM ended_at) * 1000)::bigint, role, role_updated_at, role_observed_at
    FROM membership_sync
"""
READ_PROFILES = """
    SELECT clerk_id, profile, (extract(epoch FROM updated_at) * 1000)::bigint FROM user_profiles
"""
READ_ORGANIZATIONS = """
    SELECT id, name, name_updated_at, name_observed_at, (extract(epoch FROM deleted_at) * 1000)::bigint,
           slug, image_url
    FROM organization_sync
"""
DAWDLE = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(random() * 0.003); RETURN NULL; END $$;
    CREATE TRIGGER dawdle BEFORE INSERT OR UPDATE OR DELETE ON users EXECUTE FUNCTION dawdle();
    CREATE TRIGGER dawdle BEFORE INSERT OR UPDATE OR DELETE ON user_sync EXECUTE FUNCTION dawdle();
    CREATE TRIGGER dawdle BEFORE INSERT OR UPDATE OR DELETE ON membership_sync EXECUTE FUNCTION dawdle();
    CREATE TRIGGER dawdle BEFORE INSERT OR UPDATE OR DELETE ON organization_sync EXECUTE FUNCTION dawdle();
"""
# Sorts "a" before "B" as most deployments do, which by their bytes is the other way round.
COLLATE = """
    ALTER TABLE users ALTER clerk_id TYPE varchar(255) COLLATE "und-x-icu",
                      ALTER email TYPE varchar(255) COLLATE "und-x-icu",
                      ALTER name TYPE varchar(255) COLLATE "und-x-icu",
                      ALTER organization TYPE varchar(255) COLLATE "und-x-icu";
    ALTER TABLE user_sync ALTER clerk_id TYPE varchar(255) COLLATE "und-x-icu",
                          ALTER claimed_email TYPE varchar(255) COLLATE "und-x-icu";
    ALTER TABLE membership_sync ALTER clerk_id TYPE varchar(255) COLLATE "und-x-icu",
                                ALTER id TYPE varchar(255) COLLATE "und-x-icu",
                                ALTER organization_id TYPE varchar(255) COLLATE "und-x-icu";
    ALTER TABLE organization_sync ALTER id TYPE varchar(255) COLLATE "und-x-icu",
                                  ALTER name TYPE varchar(255) COLLATE "und-x-icu";
"""


class Trial:
    """Delivers to the database that the settings name; `tried` counts what."""

    def __init__(self, settings: config.Settings) -> None:
        assert settings.database_url
        self.tried: Counter[str] = Counter()
        self.url = settings.database_url.get_secret_value()
        self.connection = psycopg.connect(self.url, autocommit=True, prepare_threshold=None)
        self._settings = settings
        self._database = Database(settings)
        self._threads = ThreadPoolExecutor(settings.db_pool_size)

    def close(self) -> None:
        self._threads.shutdown()
        self.connection.close()
        self._database.dispose()

    def forget_connections(self) -> None:
        """Let the next batch be applied on a new connection."""
        self._database.dispose()

    def dawdle(self) -> None:
        """From now on every writing statement takes its time, so that transactions meet in the middle."""
        self.connection.execute(DAWDLE)

    def collate(self) -> None:
        """From now on the columns sort as a language does. Skips the test where PostgreSQL has no ICU."""
        known = self.connection.execute("SELECT FROM pg_collation WHERE collname = 'und-x-icu'").fetchone()
        if known is None:
            pytest.skip("PostgreSQL was built without ICU")
        self.connection.execute(COLLATE)

    def reset(self) -> None:
        """Empty the tables; TRUNCATE takes a hundred times as long."""
        self.connection.execute(RESET)

    def deliver(self, plan: BatchPlan, choices: Choices, foreign_rows: str | None = None) -> None:
        """Bring an empty database through `plan`; what a worker raises is raised here.

        `foreign_rows` is a statement that inserts what the application wrote before.
        """
        self.reset()
        if foreign_rows:
            self.connection.execute(foreign_rows.encode())
        waiting = iter(plan.batches)
        work = partial(self._drain, waiting, choices)
        if plan.workers == 1:
            work()
        else:
            running = [self._threads.submit(work) for _ in range(plan.workers)]
            for worker in running:
                worker.result(PATIENCE_S)
        self.tried["permutations"] += 1
        self.tried["batches"] += len(plan.batches)
        self.tried["deliveries"] += sum(map(len, plan.batches))

    def apply(self, batch: Sequence[SentEvent], choices: Choices) -> None:
        settings = self._settings.model_copy(update=choices._asdict())
        keys = FieldSources.of(settings)
        changes = [incoming(d.svix_id, body(d.event).decode(), d.received_at, keys) for d in batch]
        outcomes = users.apply(self._database, changes, Policy.of(settings))
        assert len(outcomes) == len(batch)

    def rows(self) -> dict[str, Row]:
        return {row[0]: Row(*row) for row in self.connection.execute(READ_USERS)}

    def tables(self) -> ExpectedTables:
        """Return what the tables hold. Fails when a tombstone keeps anything personal."""
        rows = self.rows()
        deleted, waiting, instances = {}, {}, {}
        for clerk_id, claimed, login_at, deleted_at, *instance in self.connection.execute(READ_SYNC):
            if instance[1] is not None:
                instances[clerk_id] = (instance[0], instance[1])
            if deleted_at is not None:
                assert (claimed, login_at) == (None, None)
                deleted[clerk_id] = deleted_at
            elif login_at is not None and clerk_id not in rows:
                waiting[clerk_id] = login_at
        return ExpectedTables(
            rows, deleted, waiting, self._memberships(), self._organizations(), instances, self._profiles()
        )

    def _memberships(self) -> dict[tuple[str, str], Stay]:
        found = self.connection.execute(READ_MEMBERSHIPS)
        return {
            (row[0], row[1]): Stay(
                row[2], row[3], row[4], None if row[5] is None else (row[6], row[7]), row[5]
            )
            for row in found
        }

    def _organizations(self) -> dict[str, Company]:
        found = self.connection.execute(READ_ORGANIZATIONS)
        return {
            id_: Company(name, None if name is None else (updated_at, observed_at), deleted_at, *texts)
            for id_, name, updated_at, observed_at, deleted_at, *texts in found
        }

    def _profiles(self) -> dict[str, tuple[str, int]]:
        found = self.connection.execute(READ_PROFILES)
        return {clerk_id: (as_json(cleaned(profile)), updated_at) for clerk_id, profile, updated_at in found}

    def ledger(self) -> set[tuple[str, str, str]]:
        """Return svix-id, type and Clerk id of every delivery recorded."""
        return set(self.connection.execute("SELECT svix_id, type, clerk_id FROM webhook_events"))

    def deadlocks(self) -> int:
        """Return how many deadlocks PostgreSQL has found in this database; its count may lag by seconds."""
        row = self.connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
        assert row is not None
        return int(row[0])

    def _drain(self, waiting: Iterator[Sequence[SentEvent]], choices: Choices) -> None:
        # The iterator of a list may be shared by threads: each batch goes to one of them.
        for batch in waiting:
            self.apply(batch, choices)


def expected_ledger(deliveries: Sequence[SentEvent]) -> set[tuple[str, str, str]]:
    """Return what `Trial.ledger` must return after `deliveries`."""
    return {(d.svix_id, d.event["type"], subject(d.event)) for d in deliveries}
