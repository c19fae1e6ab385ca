"""A redis-server from the PATH, for what the embedded one does not do: TLS, and options of any kind."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.dev.process import Process
from cli.dev.servers import ENVIRONMENT, HOST, free_port, port_in_use
from tests.support.certificates import Certificate
from tests.support.waiting import wait_until

BINARY = shutil.which("redis-server", path="/usr/bin:/usr/local/bin") or shutil.which("redis-server")


@contextmanager
def redis_server(
    directory: Path, *options: str, certificate: Certificate | None = None, client_certificates: bool = False
) -> Iterator[int]:
    """Run a redis-server with these options, with a certificate one that speaks TLS alone; yield its port."""
    port = free_port()
    process = Process("Redis", directory / f"redis-{port}.pid")
    log = directory / f"redis-{port}.log"
    at = ["--port", str(port)]
    if certificate:
        files = ["--tls-cert-file", certificate.cert, "--tls-key-file", certificate.key]
        wanted = (
            ["--tls-ca-cert-file", certificate.cert] if client_certificates else ["--tls-auth-clients", "no"]
        )
        at = ["--port", "0", "--tls-port", str(port), *map(str, files + wanted)]
    # in cluster mode the port of the bus would else be 10,000 above, which a connection may have
    own = ("--cluster-port", str(free_port()), "--bind", HOST, "--save", "")
    command = [str(BINARY), *at, *own, *options]
    process.launch(command, env=ENVIRONMENT, cwd=directory, log=log)
    try:
        wait_until(lambda: port_in_use(port), 10, log.read_text)
        yield port
    finally:
        process.kill()
