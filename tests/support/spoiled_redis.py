"""A redis-server of the system's, with any arguments: the embedded one speaks no TLS."""

import shutil
import socket
import subprocess
from pathlib import Path

from cli.dev.process import Process
from cli.dev.servers import ENVIRONMENT, free_port
from tests.support.waiting import wait_until

BINARY = shutil.which("redis-server")
OPENSSL = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
    *("-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=redis"),
)
LOCAL = ("--bind", "127.0.0.1", "--save", "")


class RedisServers:
    """Starts servers whose files are in a directory, and ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[Process] = []

    def start(self, *arguments: str, tls: bool = False) -> int:
        """Start a server with these arguments and return its port."""
        port = free_port()
        at = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
        process = Process("Redis", self.directory / f"{port}.pid")
        log = self.directory / f"{port}.log"
        process.launch(
            # in cluster mode the port of the bus would else be 10,000 above, which a connection may have
            [str(BINARY), *at, "--cluster-port", str(free_port()), *LOCAL, *arguments],
            env=ENVIRONMENT,
            cwd=self.directory,
            log=log,
        )
        self._started.append(process)
        wait_until(lambda: listens(port), 10, log.read_text)
        return port

    def certificate(self, *options: str) -> tuple[str, ...]:
        """Make a certificate, `cert.pem`, and return the arguments that let a server use it."""
        made = subprocess.run(
            [*OPENSSL, *options], cwd=self.directory, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr
        return ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem")

    def kill(self) -> None:
        """End all of them."""
        for process in self._started:
            process.kill()


def listens(port: int) -> bool:
    """Say whether something takes connections at the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
