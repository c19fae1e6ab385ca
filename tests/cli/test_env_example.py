import re
from pathlib import Path

import pytest

import config

EXAMPLE = Path(__file__).parents[2] / ".env.example"
VARIABLE = re.compile(r"^# (?P<comment>.+)\n(?P<name>[A-Z_]+)=(?P<value>.*)$", re.MULTILINE)
SECRET_NAME = "CLERK_WEBHOOK_SIGNING_SECRET"


def values() -> dict[str, str]:
    return {found["name"]: found["value"] for found in VARIABLE.finditer(EXAMPLE.read_text())}


def test_the_example_names_every_setting_with_a_comment_and_nothing_else() -> None:
    assignments = [line.partition("=")[0] for line in EXAMPLE.read_text().splitlines() if "=" in line]
    assert assignments == list(values()), "a variable without a comment, or one named twice"
    assert sorted(assignments) == sorted(name.upper() for name in config.Settings.model_fields)


def test_a_placeholder_left_in_the_example_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_NAME, values()[SECRET_NAME])
    with pytest.raises(config.SettingsError, match=f"^{SECRET_NAME} "):
        config.load()


@pytest.mark.parametrize("name", sorted(set(values()) - {SECRET_NAME}))
def test_every_other_value_in_the_example_is_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without = config.load()
    monkeypatch.setenv(name, values()[name])
    assert config.load() == without
