"""A child process that its parent can always end, even if a later run is that parent."""

import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from config import ServiceError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL = 0.02  # s
PATIENCE = 30.0  # s, after which a child that does not end is killed
SETPRIV = "setpriv"  # of util-linux
Handler = Callable[[int, FrameType | None], None]


class DevError(ServiceError):
    """The local stack cannot run; the message is one line that says what to do."""


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file of this service. Raises DevError if it is a symbolic link or belongs to another user.

    Without this check a user who may write in the directory could make root open any file.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except PermissionError:
        raise DevError(f"{path} belongs to another user: run as that user, or delete {path.parent}") from None
    except OSError as error:
        # on Linux: ELOOP, or ENOTDIR if a directory was expected
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
            raise DevError(f"{path} is a symbolic link, which is not followed: delete it") from None
        raise DevError(f"{path} cannot be opened: {error.strerror}") from None


class Account(NamedTuple):
    """The user and the group that a child runs as, by number.

    With `capability`, a name in setpriv(1), the child keeps that capability of root.
    """

    uid: int
    gid: int
    capability: str | None = None

    def command(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """Return the command that runs `argv` with the capability."""
        if self.capability is None:
            return list(argv)
        # access(2) ignores capabilities while they depend on the user (capabilities(7))
        ids = (f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups")
        capabilities = (f"--{kind}-caps=+{self.capability}" for kind in ("inh", "ambient"))
        return [SETPRIV, *ids, "--securebits=+no_setuid_fixup", *capabilities, "--", *argv]


class Process:
    """One child, in a session of its own, so that Ctrl-C in a terminal reaches only its parent.

    The child holds a lock on the file `record` as long as it, or a process that inherited its files, runs
    (flock(2): a lock belongs to the open file, not to the process). So if the lock is free, all of these have
    ended; if it is held, the process whose id is in the file is the one that was started here.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, name: str, record: Path) -> None:
        self.name = name
        self.record = record
        self._child: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The process id while the child runs, else None."""
        return self._child.pid if self._child and self.running else None

    @property
    def running(self) -> bool:
        """Whether the child that this object started is running."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The child's exit status (negative: the signal that killed it); None while it runs."""
        return self._child.poll() if self._child else None

    @property
    def recorded_pid(self) -> int | None:
        """The process id of the child that this or an earlier run started last, even if it has ended."""
        try:
            return int(self.record.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def launch(  # noqa: PLR0913 - as subprocess has it
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        account: Account | None = None,
        text: str = "",
    ) -> "subprocess.Popen[bytes]":
        """Start `argv` and return its process. Its output goes to the end of `log`, if given.

        Its standard input is `text`, a few lines at most. Without `env` it inherits the environment. A child
        that an earlier run left behind is ended first. Raises DevError.
        """
        if self.running:
            raise DevError(f"{self.name} already runs (process {self.pid})")
        # with a capability setpriv is what changes the user
        changed = None if account is None or account.capability else account
        with self._locked_record() as lock, self._output(log) as output, _input(text) as source:
            os.ftruncate(lock, 0)
            try:
                with _signals_deferred():
                    self._child = subprocess.Popen(  # noqa: S603 - a list, no shell
                        account.command(argv) if account else argv,
                        stdin=source,
                        stdout=output,
                        stderr=output,
                        cwd=cwd,
                        env=env,
                        start_new_session=True,
                        pass_fds=[lock],
                        user=changed.uid if changed else None,
                        group=changed.gid if changed else None,
                        extra_groups=[] if changed else None,
                    )
                    os.pwrite(lock, f"{self._child.pid}\n".encode(), 0)
            except OSError as error:
                raise DevError(f"{self.name} could not be started: {error.strerror}") from None
        return self._child

    def finish(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the end of a child and return its exit status. On an interrupt, kill it with its group."""
        try:
            return child.wait()
        except BaseException:
            self.kill()
            self.end_left_over(signal.SIGKILL)  # its own children may take a moment longer
            raise

    def reason(self) -> str:
        """Return the log line that says why the child ended: the last fatal line, else the last line."""
        if self._log is None:
            return "see above"
        with open(open_own(self._log, os.O_RDONLY), "rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
        return f"{(fatal or lines or ['no reason given'])[-1]} ({self._log})"

    def last_words(self) -> str:
        """Describe how the child ended, with the reason from its log unless it was killed."""
        status = self.exit_status or 0
        return f"(signal {-status})" if status < 0 else f"(exit status {status}): {self.reason()}"

    def end(self, signum: int | None = None, patience: float = PATIENCE) -> None:
        """Send a signal and wait until the child has ended; after `patience` seconds kill its group."""
        if not self._child:
            return
        if self.running:
            self._child.send_signal(signum or self.stop_signal)
        try:
            self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the child and its process group, and wait for its end."""
        if self._child:
            if self.running:
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def end_left_over(self, signum: int | None = None) -> None:
        """End the child of an earlier run that was itself killed, if there is one. Raises DevError."""
        if self.record.parent.exists():
            with self._locked_record(signum):
                pass

    @contextmanager
    def _output(self, log: Path | None) -> Iterator[IO[bytes] | None]:
        self._log = log
        if log is None:
            yield None
            return
        with open(open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            self._log_start = file.tell()
            yield file

    @contextmanager
    def _locked_record(self, signum: int | None = None) -> Iterator[int]:
        """Yield the open and locked record; the recorded child has ended by then."""
        with open(open_own(self.record, os.O_RDWR | os.O_CREAT)) as record:
            self._end_recorded(record.fileno(), signum or self.stop_signal)
            yield record.fileno()

    def _end_recorded(self, lock: int, signum: int) -> None:
        if try_lock(lock):
            return
        pid = self.recorded_pid
        for attempt in (signum, signal.SIGKILL):
            try:
                with suppress(ProcessLookupError):  # it has ended already, and its children are about to end
                    if pid:
                        os.kill(pid, attempt)
            except PermissionError:
                raise DevError(f"{self.name} already runs here as another user (process {pid})") from None
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                if try_lock(lock):
                    return
                time.sleep(POLL)
        raise DevError(f"{self.name} of an earlier run does not end: stop process {pid or 'unknown'}")


def try_lock(file: int) -> bool:
    """Lock an open file unless another process holds the lock; return whether it is locked now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _input(text: str) -> Iterator[int]:
    """Yield a file from which `text` can be read: a pipe, which no other process can open."""
    source, sink = os.pipe()
    try:
        os.write(sink, text.encode())
        os.close(sink)
        yield source
    finally:
        os.close(source)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer the signals that stop this process: none arrives between a child's start and its record."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers only in the main thread
        return
    came: list[int] = []
    try:
        with _handled_by(lambda signum, _frame: came.append(signum), STOP_SIGNALS):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT, SIGTERM or SIGHUP; ignore later ones.

    Python can lose the exception, for example in a destructor: see `raise_if_interrupted`.
    """

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise KeyboardInterrupt

    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with _handled_by(interrupt, [it for it in STOP_SIGNALS if not (is_nohup and it == signal.SIGHUP)]):
        yield


@contextmanager
def _handled_by(handler: Handler, signals: Sequence[signal.Signals]) -> Iterator[None]:
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def ignore_signals() -> None:
    """Ignore further signals, so that stopping is not interrupted."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, _ignored)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come, in case the first one was lost."""
    if signal.getsignal(signal.SIGINT) is _ignored:
        raise KeyboardInterrupt


def _ignored(_signum: int, _frame: FrameType | None) -> None:
    """Do nothing. It is a handler, because a child would inherit SIG_IGN."""
