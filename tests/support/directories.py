"""Temporary directories for servers and what writes beside them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_directory() -> Iterator[Path]:
    """Make a short directory for the length of the block, through which other users may pass.

    Under root servers run as another user. A Unix socket's path has room for a hundred characters.
    """
    with tempfile.TemporaryDirectory(prefix="clerk-sync-") as path:
        directory = Path(path)
        directory.chmod(0o711)
        yield directory
