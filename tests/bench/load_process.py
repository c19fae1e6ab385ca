"""The load client in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from tests.bench.load import LoadReport, Spec

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60  # for signing all requests, and for the last answers


class LoadProcess:
    """A load client that has been started."""

    def __init__(self, client: "subprocess.Popen[bytes]", output: IO[str], limit_s: float) -> None:
        self._client = client
        self._output = output
        self._deadline = time.monotonic() + limit_s

    @property
    def running(self) -> bool:
        assert time.monotonic() < self._deadline
        return self._client.poll() is None

    def stop(self) -> None:
        """Let it send no more; it still waits for the last answers."""
        self._client.terminate()

    def report(self) -> LoadReport:
        """Return its report, once it has ended."""
        assert self._client.wait(PATIENCE_S) == 0
        self._output.seek(0)
        return LoadReport(**json.load(self._output))


@contextmanager
def load_process(spec: Spec) -> Iterator[LoadProcess]:
    """Run the load client for the length of the block."""
    argv = [sys.executable, "-m", "tests.bench.load", json.dumps(spec._asdict())]
    with TemporaryFile("w+") as output, subprocess.Popen(argv, cwd=ROOT, stdout=output) as client:
        try:
            yield LoadProcess(client, output, spec.seconds + PATIENCE_S)
        finally:
            client.kill()
