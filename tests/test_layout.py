"""The storeys that import-linter cannot see: `config` is one file, and the environment has one reader."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
STOREYS = ("cli", "web", "worker", "db")


def test_config_imports_no_storey() -> None:
    assert not _imported(ROOT / "config.py") & set(STOREYS)


def test_only_config_reads_the_environment() -> None:
    readers = [
        path.relative_to(ROOT)
        for storey in STOREYS
        for path in (ROOT / storey).rglob("*.py")
        if {"environ", "environb", "getenv"} & _used_of_os(path)
    ]
    assert readers == []


def test_the_top_level_holds_what_convention_puts_there() -> None:
    folders = {"cli", "db", "docs", "migrations", "tests", "web", "worker"}
    files = {"clerk_sync.py", "config.py", "pyproject.toml"}
    assert folders | files <= {path.name for path in ROOT.iterdir()}


def test_no_two_classes_have_the_same_name() -> None:
    paths = (path for folder in (*STOREYS, "tests") for path in (ROOT / folder).rglob("*.py"))
    trees = (ast.parse(path.read_text()) for path in (*paths, ROOT / "config.py"))
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _used_of_os(path: Path) -> set[str]:
    """Return the names of `os` that a file uses; `request.environ` is WSGI's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names |= {alias.name for alias in node.names}
    return names
