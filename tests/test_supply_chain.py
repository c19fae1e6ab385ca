"""What this project takes from others: all of it declared, pinned by hash, and from a package index."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*)(?:;(.*))?")
EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
PIN = re.compile(r"([a-z0-9-]+)==([A-Za-z0-9.]+)(?: ; ([^\\]+))?((?: --hash=sha256:[0-9a-f]{64})+)")
SERVICE, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"
OWN = {"clerk_sync", "cli", "config", "db", "migrations", "tests", "web", "worker"}
CARRIED = {"werkzeug": "flask", "itsdangerous": "flask"}  # Flask's own parts: its requests and signed texts
CODE = ("clerk_sync.py", "config.py", "cli", "db", "migrations", "web", "worker")

Project = dict[str, Any]


def project() -> Project:
    found: Project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def declared(*extras: str) -> list[str]:
    """Return the requirements in pyproject.toml, with those of some extras."""
    given = project()
    return [
        *given["dependencies"],
        *(line for name in extras for line in given["optional-dependencies"][name]),
    ]


def every_declared() -> list[str]:
    return declared(*project()["optional-dependencies"])


def build_needs() -> list[str]:
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return found


def lines(file: str) -> list[str]:
    """Return the requirements in a file, each with its hashes on one line."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("#")]


def pins(file: str = DEVELOPMENT) -> dict[str, str]:
    return dict(_pin(line) for line in lines(file))


def _pin(line: str) -> tuple[str, str]:
    found = PIN.fullmatch(line)
    assert found, f"not a package, its version and its hashes: {line}"
    return found[1], found[2]


def normal(name: str) -> str:
    """Return a package's name as indexes compare it. Source: packaging.python.org, "Name normalization"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(requirement: str) -> tuple[str, set[str], str, str | None]:
    """Return name, extras, versions and the extra that a requirement belongs to."""
    found = REQUIREMENT.fullmatch(requirement.strip())
    assert found, requirement
    belongs = EXTRA.search(found[4] or "")
    extras = {extra.strip() for extra in (found[2] or "").split(",") if extra.strip()}
    return normal(found[1]), extras, found[3].strip(), belongs[1] if belongs else None


def needed(requirements: list[str]) -> set[str]:
    """Return every installed package that these requirements need, by their own needs and theirs."""
    seen: set[tuple[str, str | None]] = set()
    to_do = [part for line in requirements for part in _parts(line)]
    while to_do:
        name, extra = to_do.pop()
        if (name, extra) in seen or name == "clerk-sync":
            continue
        if not _is_installed(name):  # for another Python or another system
            continue
        requirements = distribution(name).requires or []
        seen.add((name, extra))
        to_do += [part for line in requirements if parsed(line)[3] == extra for part in _parts(line)]
    return {name for name, _ in seen}


def _parts(requirement: str) -> list[tuple[str, str | None]]:
    name, extras, _, _ = parsed(requirement)
    return [(name, None), *((name, extra) for extra in extras)]


NEEDS = {SERVICE: [*declared(), *build_needs()], DEVELOPMENT: [*every_declared(), *build_needs()]}


@pytest.mark.parametrize("file", NEEDS)
def test_every_direct_dependency_is_pinned(file: str) -> None:
    direct = {parsed(line)[0] for line in NEEDS[file]} - {"clerk-sync"}
    assert direct - pins(file).keys() == set()


@pytest.mark.parametrize("file", NEEDS)
def test_everything_that_is_needed_is_pinned_to_what_is_installed(file: str) -> None:
    found = {name: distribution(name).version for name in needed(NEEDS[file])}
    assert len(found) > 40
    assert found.items() <= pins(file).items(), sorted(found.items() - pins(file).items())


@pytest.mark.parametrize("file", NEEDS)
def test_nothing_is_pinned_that_is_not_needed(file: str) -> None:
    direct = {parsed(line)[0] for line in NEEDS[file]}
    installed = {name for name in pins(file) if _is_installed(name)}
    assert installed - needed(NEEDS[file]) - direct == set()


def test_service_and_development_are_pinned_to_the_same_versions() -> None:
    assert pins(SERVICE).items() <= pins(DEVELOPMENT).items()


def test_what_builds_the_project_is_pinned_as_pyproject_requires_it() -> None:
    """The project is installed without build isolation, which would fetch packages without a hash."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert groups["build"] == build_needs()


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def test_every_direct_dependency_says_from_which_version_on() -> None:
    for line in every_declared():
        name, _, versions, _ = parsed(line)
        assert name == "clerk-sync" or versions.startswith(">="), line


def test_nothing_comes_from_a_url_or_a_repository() -> None:
    """Neither said in a file, which names no index either, nor, with other words, installed so."""
    for text in (*every_declared(), *lines(SERVICE), *lines(DEVELOPMENT)):
        assert not re.search(r"@|://|^-", text), text
    for name in needed(every_declared()):
        assert distribution(name).read_text("direct_url.json") is None, name


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_imported_through_another_is_needed_by_that_one(name: str) -> None:
    assert name in {parsed(line)[0] for line in distribution(CARRIED[name]).requires or []}


def test_the_service_imports_nothing_that_is_not_declared() -> None:
    """`clerk-sync dev` looks for the embedded servers without an import."""
    assert undeclared(declared(), *CODE) == set()


def test_the_tests_import_nothing_that_is_not_declared() -> None:
    assert undeclared(every_declared(), "tests") == set()


def undeclared(requirements: list[str], *places: str) -> set[str]:
    """Return what the Python files there import from packages that are not declared."""
    known = {parsed(line)[0] for line in requirements}
    packages = packages_distributions()
    found = set()
    for module in set(imported(*places)) - OWN - sys.stdlib_module_names:
        providers = {normal(name) for name in packages.get(module, [module])}
        if not providers & (known | {name for name, by in CARRIED.items() if by in known}):
            found.add(module)
    return found


def imported(*places: str) -> Iterator[str]:
    """Yield the top-level module of every import, wherever in a file it stands."""
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.partition(".")[0]
