"""Every pinned package installs without a compiler, on each Python and platform that the README names."""

import re

import pytest
from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name, parse_wheel_filename

from tests.platform.wheels import PINS, PLATFORMS, PYTHONS, TABLE

PIN = re.compile(
    r"^([a-z0-9-]+)==(\S+)(?: ; ([^\\\n]+))?(?: \\\n    --hash=sha256:[0-9a-f]{64})+", re.MULTILINE
)
HASH = re.compile(r"sha256:([0-9a-f]{64})")
WHEELS = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]


def wheels() -> dict[tuple[str, str], set[Tag]]:
    """Return the tags of the recorded wheels by package and version."""
    found: dict[tuple[str, str], set[Tag]] = {}
    for file, _ in WHEELS:
        name, version, _, tags = parse_wheel_filename(file)
        found.setdefault((name, str(version)), set()).update(tags)
    return found


def pins(python: str, platform: str) -> list[tuple[str, str]]:
    """Return each package that is pinned for that Python and platform, with its version."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux" if "Linux" in platform else "darwin",
        "platform_system": "Linux" if "Linux" in platform else "Darwin",
        "os_name": "posix",
    }
    found = PIN.findall(PINS.read_text())
    return [
        (canonicalize_name(name), version)
        for name, version, marker in found
        if not marker or Marker(marker).evaluate(environment)
    ]


def supported(python: str, platform: str) -> set[Tag]:
    """Return the tags of the wheels that install there."""
    version = tuple(map(int, python.split(".")))
    platforms = list(PLATFORMS[platform])
    if "macOS" in platform:
        platforms = list(mac_platforms((14, 0), platforms[0].removeprefix("macosx_14_0_")))
    return {
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, f"cp{version[0]}{version[1]}", platforms),
    }


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_a_wheel(python: str, platform: str) -> None:
    """When the pins have changed, `make wheels` writes the table anew."""
    tags, recorded = supported(python, platform), wheels()
    pinned = pins(python, platform)
    assert len(pinned) > 60
    assert [pin for pin in pinned if not tags & recorded.get(pin, set())] == []


def test_the_recorded_wheels_are_those_that_are_pinned() -> None:
    pinned = set(HASH.findall(PINS.read_text()))
    assert [file for file, hash_ in WHEELS if hash_ not in pinned] == []
