"""Write `wheels.txt`: the wheel of every pinned package for each Python and each platform.

    make wheels

asks pip, which is given no way to build anything: a package without a wheel ends this with pip's own error.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("wheels.txt")
PINS = ROOT / "requirements-dev.txt"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# glibc 2.28 is that of Debian 10 and Red Hat 8; the last three are the old names of 2.17, 2.12 and 2.5
MANYLINUX = (*(f"_2_{minor}" for minor in (28, 27, 26, 24, 17, 12, 5)), "2014", "2010", "1")
PLATFORMS = {
    "Linux x86-64": tuple(f"manylinux{name}_x86_64" for name in MANYLINUX),
    "Linux arm64": tuple(f"manylinux{name}_aarch64" for name in MANYLINUX),
    "macOS x86-64": ("macosx_14_0_x86_64",),
    "macOS arm64": ("macosx_14_0_arm64",),
}
HEAD = "# Written by `make wheels`: the wheels of requirements-dev.txt, with their hashes.\n"


def find(python: str, platforms: tuple[str, ...]) -> Iterator[str]:
    """Yield each wheel that pip would install, as file name and hash."""
    options = [option for platform in platforms for option in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as nowhere:
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--dry-run", "--ignore-installed", "--report", "-", "--target", nowhere),
            *("--only-binary", ":all:", "--no-deps", "--require-hashes", "-r", str(PINS)),
            *("--python-version", python, *options),
        ]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for item in report["install"]:
        place = item["download_info"]
        yield f"{place['url'].rpartition('/')[2]} {place['archive_info']['hashes']['sha256']}"


def main() -> None:
    """Ask for every combination and write the table."""
    found: set[str] = set()
    for python in PYTHONS:
        for platform, tags in PLATFORMS.items():
            sys.stderr.write(f"Python {python}, {platform}\n")
            found.update(find(python, tags))
    TABLE.write_text(HEAD + "".join(f"{line}\n" for line in sorted(found)))


if __name__ == "__main__":
    main()
