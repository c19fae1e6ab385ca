"""A redis-server from the PATH, for what the embedded one does not do: TLS, and options of any kind."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from cli.dev.process import Process
from cli.dev.servers import ENVIRONMENT, HOST, free_port, port_in_use
from tests.support.certificates import Certificate
from tests.support.waiting import wait_until

BINARY = shutil.which("redis-server", path="/usr/bin:/usr/local/bin") or shutil.which("redis-server")


def keep_busy(url: str) -> None:
    """Let a Redis whose --busy-reply-threshold is small run a script for as long as it is there."""

    def loop() -> None:
        with Redis.from_url(url) as redis, suppress(RedisError):
            redis.eval("while true do end", 0)

    def is_busy() -> bool:
        with Redis.from_url(url) as redis, suppress(ResponseError):
            redis.ping()
            return False
        return True

    Thread(target=loop, daemon=True).start()
    wait_until(is_busy, 20)


def refuse_to_save(redis: Redis, directory: Path) -> None:
    """Let a Redis started in that directory with `--dbfilename taken.rdb` fail to write to its disk."""
    redis.ping()  # it has loaded, and does not end because of what it finds
    (directory / "taken.rdb").mkdir()
    redis.config_set("save", "1 1")
    redis.set("key", 1)
    redis.bgsave()
    wait_until(lambda: redis.info("persistence")["rdb_last_bgsave_status"] == "err", 20)


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
        wait_until(lambda: port_in_use(port), 30, log.read_text)
        yield port
    finally:
        process.kill()
