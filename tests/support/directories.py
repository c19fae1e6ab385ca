"""Temporary directories for servers and what writes beside them."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")  # Linux: a file system in memory
ROOM = 4 * 2**30


@contextmanager
def open_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a short directory for the length of the block, through which other users may pass.

    Under root servers run as another user. A Unix socket's path has room for a hundred characters.
    """
    with tempfile.TemporaryDirectory(prefix="clerk-sync-", dir=parent) as path:
        directory = Path(path)
        directory.chmod(0o711)
        yield directory


def memory() -> Path | None:
    """Return a file system in memory, where a database, 300 files, costs a tenth; None without the room."""
    try:
        return MEMORY if shutil.disk_usage(MEMORY).free > ROOM else None
    except FileNotFoundError:
        return None
