"""The wheel holds all that runs, and runs from any directory, whatever else is on Python's path."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.dev.servers import free_port
from cli.main import COMMANDS
from tests.support import http
from tests.support.settings import MakeSettings
from tests.support.stack import Stack, environment

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "db", "migrations", "web", "worker")
MODULES = ("clerk_sync.py", "config.py")
EXPLAIN = """
import contextlib, sys
from clerk_sync import main
for name in sys.argv[1:]:
    sys.argv = ["clerk-sync", name, "--help"]
    with contextlib.suppress(SystemExit):
        main()
"""  # in one process, as most of a start is imports
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: setuptools leaves its work in the folder that it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=NOT_SHIPPED)
    for name in (*MODULES, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, target], cwd=source, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel; the packages it needs are lent from here."""
    home = tmp_path_factory.mktemp("installed")
    python, lent = home / "bin" / "python", find_spec("pip") is not None  # which uv gives no environment
    venv.create(home, with_pip=not lent)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    # Names in a .pth file are looked up after the environment's own, and the .pth files there do not count:
    # the project, which is installed here to be edited, is not found that way.
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)] if lent else [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, cwd=home)
    return home / "bin"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules have our names, and end whatever imports them."""
    folder = tmp_path / "hostile"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('imported a stranger: {name}')\n")
    (folder / "config.py").write_text("raise SystemExit('imported a stranger: config')\n")
    return folder


def test_the_wheel_holds_every_file_of_the_project_and_nothing_else(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in _files()}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files
    assert any(name.endswith(".lua") for name in held)
    assert any(name.startswith("migrations/versions/") for name in held)


def _files() -> Iterator[Path]:
    yield from (ROOT / name for name in MODULES)
    for name in PACKAGES:
        yield from (
            path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )


def test_every_command_of_the_wheel_explains_itself(installed: Path, tmp_path: Path) -> None:
    done = _run((installed / "python", "-c", EXPLAIN, *COMMANDS), tmp_path)
    used = re.findall(r"^Usage: clerk-sync (\S+)", done.stdout, re.MULTILINE)
    assert used == list(COMMANDS), done.stderr


def test_the_wheel_migrates_and_serves_in_a_hostile_folder(
    installed: Path, hostile: Path, make_settings: MakeSettings
) -> None:
    """A delivery goes all the way while PYTHONPATH and the working directory offer modules of our names."""
    settings = make_settings(port=free_port(), web_workers=1)
    path = {"PYTHONPATH": f".{os.pathsep}{hostile}"}
    upgraded = _run((installed / "clerk-sync", "db", "upgrade"), hostile, environment(settings) | path)
    assert upgraded.returncode == 0, upgraded.stderr
    with Stack(settings, hostile, command=[installed / "clerk-sync"], extra_environment=path) as stack:
        command = (installed / "clerk-sync", "send", "user.created", "--url", stack.url)
        sent = _run(command, hostile, environment(settings) | path)
        assert "202" in sent.stdout, sent.stderr + stack.logs()
        assert http.get(f"{stack.base_url}/health").is_success, stack.logs()


@pytest.mark.parametrize("path", [{"PYTHONPATH": "."}, {}], ids=str)
@pytest.mark.parametrize("call", [["clerk-sync"], ["python", "-m", "clerk_sync"]])
def test_the_wheel_is_not_misled_by_its_neighbours(
    installed: Path, hostile: Path, call: list[str], path: dict[str, str]
) -> None:
    _assert_not_misled(installed, hostile, call, path)


@pytest.mark.parametrize("call", [["clerk-sync"], ["python", "-m", "clerk_sync"]])
def test_neither_is_the_project_installed_to_be_edited(hostile: Path, call: list[str]) -> None:
    _assert_not_misled(Path(sys.executable).parent, hostile, call, {"PYTHONPATH": "."})


def _assert_not_misled(commands: Path, hostile: Path, call: list[str], path: dict[str, str]) -> None:
    name, *arguments = call
    done = _run((commands / name, *arguments, "web", "--help"), hostile, path)
    assert done.stdout.startswith("Usage: clerk-sync web"), done.stderr


def _run(
    command: Sequence[str | Path], folder: Path, given: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={"PATH": os.defpath, **(given or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
