"""The README and the pages under docs say what the code says."""

import re
from pathlib import Path

import pytest

import config
from cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#:\s]+)\)")


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
        told = defaults[name.upper()]
        if field.default in (None, ()):
            assert told == "none" or told.startswith(("required", "DATABASE_URL")), name
        else:
            assert told == str(field.default), name


def test_the_command_table_names_every_command() -> None:
    assert sorted(row[0] for row in table("Commands")) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
