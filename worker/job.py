"""The function that every job names.

`clerk-sync worker` does not call it, because it applies whole batches. A plain RQ worker calls it for each
job, with the same effect.
"""

from datetime import UTC, datetime
from functools import cache

from rq import get_current_job

from config import Settings, load
from db.apply import users
from db.connection.engine import Database
from db.merge.policy import Policy
from db.times import to_ms
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming


def apply_delivery(body: str) -> str:
    """Apply one delivery and return its outcome.

    Raises EventError, DatabaseUnavailable or ChangeRefused; RQ retries each as the job's settings say.
    """
    job = get_current_job()
    received = job.created_at if job else datetime.now(UTC)
    settings, database = _process_wide()
    change = incoming(job.id if job else None, body, to_ms(received), FieldSources.of(settings))
    return users.apply(database, [change], Policy.of(settings))[0].value


@cache
def _process_wide() -> tuple[Settings, Database]:
    settings = load("database_url")
    return settings, Database(settings)
