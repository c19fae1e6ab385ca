"""`.data/`: the files that `clerk-sync dev` keeps between runs, closed to the other users of the machine."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.dev.process import DevError, open_own, try_lock

DATA = Path(".data")
PASSABLE = stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH


@contextmanager
def data_directory() -> Iterator[Path]:
    """Create `.data/` in the working directory and lock it for this run. Raises DevError.

    Only its owner may list it. Under root the servers run as another account, which may enter it.
    """
    data = Path.cwd() / DATA
    with own_directory(data) as directory:
        if os.fstat(directory).st_uid != os.geteuid():
            raise DevError(f"{data} belongs to another user: run as that user, or delete it")
        os.fchmod(directory, stat.S_IRWXU if os.geteuid() else PASSABLE)
    with open(open_own(data / "lock", os.O_RDWR | os.O_CREAT)) as lock:
        if not try_lock(lock.fileno()):
            raise DevError("clerk-sync dev already runs in this directory: stop it first")
        yield data


@contextmanager
def own_directory(path: Path) -> Iterator[int]:
    """Open a directory, which is made if need be, and is no symbolic link. Raises DevError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DevError(f"{error.filename or path} cannot be made: {error.strerror}") from None
    file = open_own(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield file
    finally:
        os.close(file)


def kept(path: Path, make: Callable[[], str]) -> str:
    """Return the content of the file; the first time, write what `make` returns. Raises DevError."""
    if not path.exists():
        write_private(path, make())
    with open(open_own(path, os.O_RDONLY)) as file:
        return file.read()


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that only its owner may read, in one step: readers never see a part of it."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(open_own(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    new.replace(path)
