"""The compared handler: one statement per event.

    python -m tests.bench.baseline_job SEED COUNT     (the bare loop: prints events/s and us of CPU per event)

It is not in baselines.py, as each job of a forking worker imports this module again, without Flask.
"""

import json
import os
import sys
import time
from typing import Any

import psycopg

UPSERT = """
    INSERT INTO users (clerk_id, email, name) VALUES (%s, %s, %s)
    ON CONFLICT (clerk_id) DO UPDATE SET email = excluded.email, name = excluded.name
"""
SIGN_IN = "UPDATE users SET last_login_at = to_timestamp(%s / 1000.0) WHERE clerk_id = %s"

_connection: psycopg.Connection[Any] | None = None


def handle_body(body: str | bytes) -> None:
    """Write one event to PostgreSQL and commit: an RQ job function, and the inline handler's work.

    The connection lives as long as the process; a worker that forks for each job makes a new one each time.
    """
    global _connection  # noqa: PLW0603 - as such handlers do
    if _connection is None:
        _connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    upsert(_connection, json.loads(body))


def upsert(connection: psycopg.Connection[Any], event: dict[str, Any]) -> None:
    data = event["data"]
    if event["type"].startswith("session."):
        connection.execute(SIGN_IN, (data["created_at"], data["user_id"]))
        return
    address = data["email_addresses"][0]["email_address"]
    name = f"{data['first_name']} {data['last_name']}"
    connection.execute(UPSERT, (data["id"], address, name))


def main() -> None:
    from tests.bench.events import traffic  # noqa: PLC0415 - no job needs it

    seed, count = int(sys.argv[1]), int(sys.argv[2])
    bodies = [event.body for event in traffic(count, seed=seed)]
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        began, cpu = time.perf_counter(), time.process_time()
        for body in bodies:
            upsert(connection, json.loads(body))
        cpu_us = (time.process_time() - cpu) * 1e6 / count
        sys.stdout.write(f"{count / (time.perf_counter() - began)} {cpu_us}")


if __name__ == "__main__":
    main()
