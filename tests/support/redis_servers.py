"""A redis-server from the PATH, for what the embedded one does not do: TLS, and options of any kind."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.dev.process import Process
from cli.dev.servers import ENVIRONMENT, HOST, free_port, port_in_use
from tests.support.certificates import Authority
from tests.support.waiting import wait_until

BINARY = shutil.which("redis-server", path="/usr/bin:/usr/local/bin") or shutil.which("redis-server")


@contextmanager
def redis_server(directory: Path, *options: str, port: int | None = None) -> Iterator[int]:
    """Run a redis-server with these options, and yield its port."""
    port = port or free_port()
    process = Process("Redis", directory / f"redis-{port}.pid")
    log = directory / f"redis-{port}.log"
    # in cluster mode the port of the bus would else be 10,000 above, which a connection may have
    own = ("--cluster-port", str(free_port()), "--bind", HOST, "--save", "")
    command = [str(BINARY), "--port", str(port), *own, *options]
    process.launch(command, env=ENVIRONMENT, cwd=directory, log=log)
    try:
        wait_until(lambda: port_in_use(port), 10, log.read_text)
        yield port
    finally:
        process.kill()


@contextmanager
def tls_redis(directory: Path, authority: Authority, addresses: str = "IP:127.0.0.1") -> Iterator[int]:
    """Run a redis-server that speaks nothing but TLS, with a certificate for these addresses."""
    made = authority.sign("redis", addresses)
    port = free_port()
    files = ("--tls-cert-file", str(made.cert), "--tls-key-file", str(made.key))
    options = ("--tls-port", str(port), *files, "--tls-auth-clients", "no", "--port", "0")
    with redis_server(directory, *options, port=port):
        yield port
