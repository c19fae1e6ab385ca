"""The drain with many users already in the tables, beside the drain into empty ones."""

from functools import partial

from tests.bench import drain
from tests.bench.drain import Backlog, Contender
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Urls, migrate
from tests.bench.plan import BenchPlan, Setting
from tests.support import payloads
from tests.support.databases import with_database
from worker.queue.rq_format import QUEUE

PART = "drain with users in the tables"
ADD_USERS = """
    INSERT INTO users (clerk_id, email, name, created_at)
    SELECT 'user_bench000' || lpad(i::text, 18, '0'), 'bench0.' || i || '@example.com', 'No ' || i,
           to_timestamp(%(now)s / 1000.0)
    FROM generate_series(0, %(count)s - 1) AS i
"""
ADD_SYNC = """
    INSERT INTO user_sync (clerk_id, profile_updated_at, profile_observed_at,
                           claimed_email, claim_updated_at, claim_observed_at)
    SELECT clerk_id, %(now)s, %(now)s, email, %(now)s, %(now)s FROM users
"""


def measure_growth(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Measure with ten million users. It takes minutes and some 10 GB, so only `--only growth` runs it."""
    measure(bench, plan._replace(big_table=plan.growth), figures)


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Drain into empty tables and into full ones in turn, each time other events."""
    urls = bench.urls(Setting.LOCAL)
    many = Urls(with_database(urls.database, f"many_{plan.big_table}"), urls.redis)
    _make_users(bench, many.database, plan.big_table)
    backlog = Backlog(bench, 1, QUEUE)
    cases = {
        users: ComparedCase(PART, f"clerk-sync worker, {users:,} users", Setting.LOCAL)
        for users in (0, plan.big_table)
    }
    for _ in range(plan.rounds):
        for users, case in cases.items():
            backlog.fill(drain.put_deliveries(bench.next_seed(), users), plan.backlog // 2)
            contender = Contender(case.subject, backlog, 1, partial(bench.workers, many if users else urls))
            figures.add(case, drain.drain(bench, contender))
    text = f"drain, {plan.big_table:,} users : none"
    figures.compare(text, cases[plan.big_table], cases[0], drain.RATE, at_least=0.75)


def _make_users(bench: Bench, database_url: str, count: int) -> None:
    with bench.connect() as connection:
        connection.execute(f"CREATE DATABASE many_{count}")
    migrate(database_url)
    with bench.connect(f"many_{count}") as connection:
        for statement in (ADD_USERS, ADD_SYNC):
            connection.execute(statement, {"now": payloads.NOW, "count": count})
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
