"""The README and the pages under docs say what the code says."""

import re
from datetime import UTC, datetime
from pathlib import Path

import config
from cli.main import COMMANDS
from tests.support.commands import run
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import user, user_event
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, deliver, open_context, rows
from web.app import create_app
from worker.redis_client import worker_redis
from worker.sync.last_run import KINDS, keep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without their backquotes."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


def test_the_environment_table_names_every_setting() -> None:
    named = [row[0] for row in table("Environment")]
    assert sorted(named) == sorted(field.upper() for field in config.Settings.model_fields)


def test_the_environment_table_tells_the_defaults() -> None:
    defaults = {row[0]: row[1] for row in table("Environment")}
    for name, field in config.Settings.model_fields.items():
        documented = defaults[name.upper()]
        if field.default in (None, ()):
            assert documented == "none" or documented.startswith(("required", "DATABASE_URL")), name
        else:
            assert documented == str(field.default), name


def test_the_command_table_names_every_command() -> None:
    assert sorted(row[0] for row in table("Commands")) == sorted(COMMANDS)


def test_what_a_reconciliation_synced_is_shown_everywhere(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(
        console_password="long enough", clerk_secret_key="sk_live_x", reconcile_every="6h"
    )
    redis = worker_redis(settings)
    moments = dict.fromkeys(("started_at", "finished_at"), datetime.now(UTC).isoformat())
    drift = {**dict.fromkeys(KINDS, 0), "merged": 1200, "refusal": None}
    keep(redis, {**moments, "error": None, "backfill": {"created": 30, "updated": 4}, "drift": drift})
    redis.close()
    client = create_app(settings).test_client()
    documented = client.get("/health").json
    assert documented is not None
    assert documented["reconciliation"]["synced"] == {"created": 30, "updated": 4, "merged": 1200}
    assert 'clerk_sync_reconcile_synced{how="merged"} 1200.0' in client.get("/metrics").text
    page = client.get("/console", auth=("anybody", "long enough")).text
    assert "no user differs; 1,234 synced" in page
    shown = " ".join(run(settings, "status").stdout.split())
    assert "1,234 synced (30 created, 4 updated, 1,200 merged), 0 differing" in shown


def test_every_command_for_filling_and_repairing_works(clerk: FakeClerk, make_settings: MakeSettings) -> None:
    clerk.put_many(30)
    settings = api_settings(make_settings, clerk)
    with open_context(settings) as both:
        deliver(both, user_event(data=user("user_sample")))
    section = README.partition("\n## Users from before")[2].partition("\n## ")[0]
    commands = re.findall(r"^    clerk-sync ([^#\n]*)", section, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        ran = run(settings, *command.split(), *(["--yes"] if "reset" in command else []))
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
    assert set(rows(settings)) == set(clerk.ids())
