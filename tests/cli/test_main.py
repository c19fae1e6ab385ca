"""What every command has in common, seen from a shell."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest

from cli.dev.servers import free_port
from cli.main import COMMANDS, cli, describe
from config import SettingsError
from db.connection.errors import DatabaseUnavailable
from tests.support import http
from tests.support.commands import Ran, run_with
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.settings import NOTHING_LISTENS, SECRET, MakeSettings
from tests.support.stack import environment
from tests.support.waiting import wait_until

DATABASE = {"DATABASE_URL": "postgresql://127.0.0.1:1/x"}


def run(*arguments: str, directory: Path, **variables: str) -> Ran:
    """Run `clerk-sync` in an empty directory with no settings but `variables`."""
    return run_with(_environment(variables), *arguments, directory=directory)


def _environment(variables: dict[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **variables}


def test_help_names_every_command_and_is_no_failure(tmp_path: Path) -> None:
    ran = run("--help", directory=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    listed = {line.split()[0] for line in ran.stdout.partition("Commands:")[2].splitlines() if line.strip()}
    assert listed >= COMMANDS.keys()


def test_ctrl_c_during_the_first_imports_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-P", "-m", "clerk_sync", "status"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=_environment({}), stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stderr
        next(line for line in started.stderr if line.split()[-1] == "click.globals")
        started.send_signal(signal.SIGINT)
        said = [line for line in started.stderr if not line.startswith("import time:")]
    assert (started.returncode, said[-1]) == (1, "clerk-sync: stopped\n")
    assert "Traceback" not in "".join(said)


def test_the_version_is_reported(tmp_path: Path) -> None:
    ran = run("--version", directory=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.startswith("clerk-sync, version ")


@pytest.mark.parametrize(
    "arguments", [("worke",), ("db", "upgrad"), ("events", "--limit", "many"), ("status", "x")]
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(*arguments, directory=tmp_path, **DATABASE)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Error: " in ran.stderr
    assert "Traceback" not in ran.stderr


NEEDED = DATABASE | {
    "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "PORT": "0",
}
SERVICE = ("web", "worker", "status")
ODD_REDIS_URLS = (
    "rediss://:hunter2@h/0?ssl_cert_reqs=hunter2",
    "redis://:hunter2@h/0?socket_timeout=hunter2",
    "redis://:hunter2@h/0?hunter2=1",
    "redis://:hunter2@h/0?cache_config=hunter2",
    "redis://:hunter2@h/0?event_dispatcher=hunter2",
    "redis://:hunter2@h/0?maint_notifications_config=hunter2",
    "redis://:hunter2@h/0?oss_cluster_maint_notifications_handler=hunter2",
    "redis://:hunter2@h/0?redis_connect_func=hunter2",
    "redis://:hunter2@h/0?socket_keepalive_options=hunter2",
    "redis://:hunter2@h/0?socket_type=hunter2",
)


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ("worker", {}, "REDIS_URL is not set; DATABASE_URL is not set"),
        (
            "db current",
            {"DATABASE_URL": "mysql://u:hunter2@h/d"},
            "DATABASE_URL must begin with postgres:// or postgresql://",
        ),
        (
            "db current",
            {"DATABASE_URL": "postgresql://secret_user:hunter2@127.0.0.1:1/secret_name"},
            NOTHING_LISTENS,
        ),
        (
            "status",
            {"PORT": "x", "BATCH_SIZE": "0", "LOG_LEVEL": "loud", "DB_POOL_TIMEOUT": "soon"},
            "BATCH_SIZE must be greater than or equal to 1; DB_POOL_TIMEOUT must be a number;"
            " LOG_LEVEL must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'; PORT must be a number",
        ),
        *(
            (command, NEEDED | {"REDIS_URL": url}, "REDIS_URL has an option that cannot be read")
            for command in SERVICE
            for url in ODD_REDIS_URLS
        ),
        *(
            (
                command,
                NEEDED | {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/x?pgbouncer=true"},
                "DATABASE_URL has an option that libpq does not know: remove it",
            )
            for command in SERVICE
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_does_not_show_it(
    command: str, variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    ran = run(*command.split(), directory=tmp_path, **variables)
    assert ran == (1, "", f"clerk-sync: {message}\n")


def test_debug_shows_where_it_happened_as_well_and_no_address_either(tmp_path: Path) -> None:
    url = f"postgresql://secret_user:hunter2@127.0.0.1:{free_port()}/secret_name"
    ran = run("--debug", "db", "current", directory=tmp_path, DATABASE_URL=url)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Traceback (most recent call last):\n")
    assert ran.stderr.endswith(f"\nclerk-sync: {NOTHING_LISTENS}\n")
    assert "hunter2" not in ran.stderr
    assert "secret_" not in ran.stderr


def test_a_question_without_a_terminal_is_wrong_usage(tmp_path: Path, make_settings: MakeSettings) -> None:
    ran = run("db", "reset", directory=tmp_path, **environment(make_settings(redis_url=None)))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.endswith("Error: nothing was changed: without a terminal, add --yes to confirm\n")


def test_settings_are_read_from_a_file_in_the_directory(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=mysql://h/d\n")
    ran = subprocess.run(
        clerk_sync("db", "current"),
        cwd=tmp_path,
        env=_environment({}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    message = "clerk-sync: DATABASE_URL must begin with postgres:// or postgresql://\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", message)


def test_a_command_answers_and_logs_nothing(tmp_path: Path, make_settings: MakeSettings) -> None:
    variables = environment(make_settings(redis_url=None)) | {"LOG_LEVEL": "debug"}
    ran = run("events", "--json", directory=tmp_path, **variables)
    assert ran == (0, "[]\n", "")


def test_status_ends_with_1_and_names_what_is_wrong(tmp_path: Path, make_settings: MakeSettings) -> None:
    settings = make_settings(redis_url=f"redis://:hunter2@127.0.0.1:{free_port()}")
    ran = run("status", "--json", directory=tmp_path, **environment(settings))
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "nothing listens where REDIS_URL leads: start Redis, or correct REDIS_URL" in ran.stdout
    assert "hunter2" not in ran.stdout


def test_only_errors_of_our_own_are_shown_with_their_words() -> None:
    assert describe(SettingsError("PORT is not set")) == "PORT is not set"
    assert describe(DatabaseUnavailable("no connection")) == "no connection"
    assert describe(ValueError("ann@example.com")) == "unexpected ValueError (see it with --debug)"


def test_no_command_needs_settings_to_explain_itself(tmp_path: Path) -> None:
    for words in _all_commands():
        ran = run(*words, "--help", directory=tmp_path)
        assert (ran.returncode, ran.stderr) == (0, ""), words
        assert ran.stdout.startswith(f"Usage: clerk-sync {' '.join(words)} ")


def _all_commands() -> Iterator[tuple[str, ...]]:
    for name in COMMANDS:
        yield (name,)
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):
            yield from ((name, part) for part in command.commands)


EACH_IN_A_FORK = """
import os, sys
from importlib import import_module
from cli.main import COMMANDS, main

for module in {COMMANDS[command.split()[0]] for command in sys.argv[1:-1]}:
    import_module(module)
for command in sys.argv[1:]:
    if os.fork() == 0:
        main(command.split())
    os.wait()
"""
OUTPUTS = ("status", "events", "failed list", "user user_1", "-h")


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("{} >&-", ""),
        ("{} >/dev/full", "clerk-sync: the output cannot be written: No space left on device\n"),
        ("mkdir gone && cd gone && rmdir ../gone && ({}; :) | true", ""),
    ],
    ids=["closed", "full", "a closed pipe from a deleted directory"],
)
def test_an_output_that_is_closed_or_full_and_a_deleted_directory_are_one_line_at_most(
    tmp_path: Path, make_settings: MakeSettings, shell: str, said: str
) -> None:
    """Loading the modules takes ten times as long as a command."""
    line = shlex.join([sys.executable, "-P", "-c", EACH_IN_A_FORK, *OUTPUTS])
    ran = subprocess.run(
        ["sh", "-c", shell.format(line)],
        cwd=tmp_path,
        env=_environment(environment(make_settings())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == said * len(OUTPUTS)


def test_with_port_0_the_port_that_was_bound_is_logged(tmp_path: Path, make_settings: MakeSettings) -> None:
    settings = make_settings(port=0, web_workers=1)
    with ServiceProcess("web", clerk_sync("web"), environment(settings), tmp_path) as web:
        port = web.await_line("receiver started", 20)["port"]
        wait_until(lambda: _lives(port), 20)


def _lives(port: int) -> bool:
    try:
        return http.get(f"http://127.0.0.1:{port}/health/live").is_success
    except httpx.TransportError:
        return False
