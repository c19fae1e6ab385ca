"""Dockerfile and compose.yaml: no container runs here, so each line is checked or executed by itself."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml

import config
from tests.support.settings import SECRET, MakeSettings
from web.app import create_app

ROOT = Path(__file__).parents[2]
HOME = "/opt/clerk-sync"
OF_OTHERS = {"POSTGRES_PASSWORD"}
SUBSTITUTION = re.compile(r"\$\{([A-Z_]+)(?::([-?])([^}]*))?\}")


class BuildStep(NamedTuple):
    """An instruction of the Dockerfile; `stage` counts from 0."""

    stage: int
    name: str
    text: str


def steps() -> Iterator[BuildStep]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stage = -1
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        stage += name == "FROM"
        yield BuildStep(stage, name, " ".join(rest.split()))


def texts(name: str, stage: int) -> list[str]:
    return [step.text for step in steps() if (step.name, step.stage) == (name, stage)]


def procfile() -> dict[str, list[str]]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {name: shlex.split(command) for name, _, command in (line.partition(":") for line in lines)}


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


def environment(service: dict[str, Any], **given: str) -> dict[str, str]:
    """Return a service's variables with `given` in place of the variables of compose's caller."""

    def value(found: re.Match[str]) -> str:
        name, sign, default = found.groups()
        return given[name] if name in given or sign != "-" else default

    return {name: SUBSTITUTION.sub(value, text) for name, text in service.get("environment", {}).items()}


def test_both_stages_are_slim_and_of_the_version_that_is_tested() -> None:
    version = (ROOT / ".python-version").read_text().strip()
    assert texts("FROM", 0) == [f"python:{version}-slim AS build"]
    assert texts("FROM", 1) == [f"python:{version}-slim"]


def test_everything_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    named = [name for text in texts("COPY", 0) for name in text.split()[:-1]]
    assert sorted(named) == sorted(allowed)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert not any(fnmatch(name, ".env*") for name in named)


def test_the_image_holds_the_environment_alone_and_runs_as_a_user_without_rights() -> None:
    assert texts("COPY", 1) == [f"--from=build {HOME} {HOME}"]
    (user,) = texts("USER", 1)
    assert [text.split()[-1] for text in texts("RUN", 1)] == [user] != ["root"]
    assert texts("RUN", 1)[0].startswith("useradd --system ")
    assert f"PATH={HOME}/bin:$PATH" in texts("ENV", 1)[0].split()
    order = [step.name for step in steps() if step.stage == 1]
    assert order.index("RUN") < order.index("USER") < order.index("CMD")


def test_the_command_is_the_procfiles() -> None:
    assert json.loads(texts("CMD", 1)[0]) == procfile()["web"]
    services = compose()["services"]
    assert {name: services[name]["command"] for name in procfile()} == procfile()


def test_herokus_hook_installs_the_project_as_the_image_does() -> None:
    hook = ROOT / "bin" / "post_compile"
    assert os.access(hook, os.X_OK)
    assert hook.read_text().splitlines()[-1] == "python -m pip install --no-deps --no-build-isolation ."
    assert "pip install --no-deps --no-build-isolation ." in " ".join(texts("RUN", 0))


def test_the_health_check_asks_whether_the_receiver_lives(make_settings: MakeSettings) -> None:
    (check,) = texts("HEALTHCHECK", 1)
    python, flag, code = json.loads(check.partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    (path,) = re.findall(r"'(/[a-z/]+)'", code)
    assert path == "/health/live"
    assert path in {rule.rule for rule in create_app(make_settings()).url_map.iter_rules()}
    (port,) = re.findall(r"environ.get\('PORT', '(\d+)'\)", code)
    assert port == str(config.Settings.model_fields["port"].default) == texts("EXPOSE", 1)[0]


def test_every_variable_is_a_setting_and_leads_to_a_service() -> None:
    services = compose()["services"]
    for name, service in services.items():
        known = {field.upper() for field in config.Settings.model_fields} | OF_OTHERS
        assert service.get("environment", {}).keys() <= known, name
    given = environment(services["web"], CLERK_WEBHOOK_SIGNING_SECRET=SECRET)
    loaded = config.load(_env_file=None, **{name.lower(): value for name, value in given.items() if value})
    assert loaded.database_url
    assert loaded.redis_url
    for url in (loaded.database_url, loaded.redis_url):
        assert urlsplit(url.get_secret_value()).hostname in services
    password = environment(services["postgres"])["POSTGRES_PASSWORD"]
    assert urlsplit(loaded.database_url.get_secret_value()).password == password
    assert {
        environment(services[name], CLERK_WEBHOOK_SIGNING_SECRET=SECRET)["PORT"] for name in procfile()
    } == {str(loaded.port)}
    assert services["web"]["ports"] == [f"127.0.0.1:${{PORT:-8000}}:{loaded.port}"]


def test_services_wait_for_what_they_need_and_volumes_are_declared() -> None:
    found = compose()
    services = found["services"]
    for name, service in services.items():
        waits = service.get("depends_on", {})
        assert waits.keys() <= services.keys(), name
        for other, how in waits.items():
            done = how["condition"] == "service_completed_successfully"
            assert done == (other == "release"), name
            assert done or "test" in services[other]["healthcheck"], other
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    assert sorted(mounts) == sorted(found["volumes"])
    assert {name for name in procfile() if services[name].get("healthcheck") == {"disable": True}} == {
        "release",
        "worker",
    }


def test_a_container_is_stopped_later_than_its_process_may_take() -> None:
    limit_s = config.Settings.model_fields["shutdown_seconds"].default
    assert int(compose()["services"]["worker"]["stop_grace_period"].removesuffix("s")) > limit_s


def test_redis_keeps_what_it_is_given() -> None:
    command = " ".join(compose()["services"]["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


@pytest.mark.timeout(400)
@pytest.mark.skipif(os.environ.get("TEST_CONTAINER") != "1", reason="TEST_CONTAINER=1 fetches every package")
def test_the_steps_of_the_build_make_the_command(tmp_path: Path) -> None:
    """Each step as the builder runs it, with other folders for /src and /opt/clerk-sync.

    Compiling what is installed would take half of the time, and a module that is run is compiled then.
    """
    source, home = tmp_path / "src", tmp_path / "opt"
    source.mkdir()
    call = tmp_path / "bin" / "python"
    call.parent.mkdir()
    call.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 "$@"\n')
    call.chmod(0o755)
    for step in steps():
        if step.stage == 0 and step.name == "COPY":
            _copy(step.text, source)
        elif step.stage == 0 and step.name == "RUN":
            _run(step.text.replace(HOME, str(home)), source, call.parent)
    shutil.rmtree(source)
    for name, command, *_ in procfile().values():
        assert f"Usage: {name} {command}" in _run(
            f"{home}/bin/{name} {command} --help", tmp_path, call.parent
        )
    left = {path.name for path in (home / "lib").glob("python3.*/site-packages/*")}
    assert "clerk_sync.py" in left
    assert not left & {"pip", "setuptools"}


def _copy(text: str, target: Path) -> None:
    *sources, to = text.split()
    for name in sources:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / to)


def _run(command: str, folder: Path, first_on_path: Path) -> str:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env=kept | {"PATH": f"{first_on_path}:{os.defpath}", "PIP_NO_COMPILE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout
