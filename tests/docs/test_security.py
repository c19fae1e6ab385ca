"""The security page, against the tests that it names and the places that it points to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "docs" / "security.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+)`", SECURITY)))
ROW = re.compile(r"^\| \*\*.+\|$", re.MULTILINE)


@pytest.fixture(scope="module")
def tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {
        name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_the_page_names_exists(name: str, tests: set[str]) -> None:
    assert name in tests


def test_every_answer_to_a_threat_names_a_test() -> None:
    threats = ROW.findall(SECURITY)
    assert len(threats) >= 20
    assert [row for row in threats if "`test_" not in row] == []
