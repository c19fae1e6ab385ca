"""The faults. Each lasts for the length of a block; after the block the server works again."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

from psycopg import sql
from redis.exceptions import RedisError

from tests.faults.servers import ROLE, Servers
from tests.faults.service import Service
from tests.support.processes import frozen_family
from tests.support.supervised_process import SupervisedProcess

CUT_EVERY_S = 0.5
SLOW_S = 0.15
GRACE_S = 10


class Scene(NamedTuple):
    """The servers and processes of a trial; `target` selects one process of several."""

    servers: Servers
    service: Service
    target: int

    @property
    def worker(self) -> SupervisedProcess:
        return self.service.workers[self.target % len(self.service.workers)]

    @property
    def receiver(self) -> SupervisedProcess:
        return self.service.receivers[self.target % len(self.service.receivers)]


class Fault(NamedTuple):
    """Its track, its shortest and longest duration in s, and the block that it lasts for."""

    track: str
    lasts_s: tuple[float, float]
    damage: Callable[[Scene], AbstractContextManager[None]]


TRACKS = ("worker", "receiver", "postgres", "redis")
FAULTS: dict[str, Fault] = {}


def fault(track: str, least_s: float, most_s: float) -> Callable[[Callable[[Scene], Iterator[None]]], None]:
    """Add a fault to FAULTS, under its function's name."""

    def add(damage: Callable[[Scene], Iterator[None]]) -> None:
        FAULTS[damage.__name__.replace("_", " ")] = Fault(track, (least_s, most_s), contextmanager(damage))

    return add


@fault("worker", 0, 0)
def worker_killed(scene: Scene) -> Iterator[None]:
    scene.worker.signal(signal.SIGKILL)
    yield


@fault("worker", 0, 0)
def worker_terminated(scene: Scene) -> Iterator[None]:
    scene.worker.signal(signal.SIGTERM)
    yield


@fault("worker", 18, 24)  # until other workers have taken over its jobs
def worker_frozen(scene: Scene) -> Iterator[None]:
    with _frozen(scene.worker):
        yield


@fault("worker", 0, 0)
def all_workers_killed(scene: Scene) -> Iterator[None]:
    for worker in scene.service.workers:
        worker.signal(signal.SIGKILL)
    yield


@fault("receiver", 0, 0)
def receiver_killed(scene: Scene) -> Iterator[None]:
    scene.receiver.signal(signal.SIGKILL)
    yield


@fault("receiver", 0, 0)
def receivers_process_killed(scene: Scene) -> Iterator[None]:
    scene.receiver.signal(signal.SIGKILL, child=True)
    yield


@fault("receiver", 0, 0)
def receiver_terminated(scene: Scene) -> Iterator[None]:
    scene.receiver.signal(signal.SIGTERM)
    yield


@fault("receiver", 2, 6)
def receiver_frozen(scene: Scene) -> Iterator[None]:
    with _frozen(scene.receiver):
        yield


@fault("postgres", 1, 5)
def postgres_stopped(scene: Scene) -> Iterator[None]:
    scene.servers.postgres.stop("immediate")
    yield
    scene.servers.postgres.start()


@fault("postgres", 1, 3)
def postgres_killed(scene: Scene) -> Iterator[None]:
    scene.servers.postgres.kill()
    yield
    scene.servers.postgres.start()


@fault("postgres", 2, 4)
def postgres_frozen(scene: Scene) -> Iterator[None]:
    assert scene.servers.postgres.pid
    with frozen_family(scene.servers.postgres.pid):
        yield


@fault("postgres", 2, 4)
def postgres_connections_cut_again_and_again(scene: Scene) -> Iterator[None]:
    ended = threading.Event()

    def cut() -> None:
        while not ended.wait(CUT_EVERY_S):
            scene.servers.cut_connections()

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join(GRACE_S)


@fault("postgres", 2, 4)
def postgres_says_too_many_connections(scene: Scene) -> Iterator[None]:
    with _altered(scene, "ROLE", ROLE, "CONNECTION LIMIT 0", "CONNECTION LIMIT -1"):
        yield


@fault("postgres", 2, 4)
def postgres_accepts_no_connections(scene: Scene) -> Iterator[None]:
    allow = "ALLOW_CONNECTIONS {}".format
    with _altered(scene, "DATABASE", scene.servers.database, allow("false"), allow("true")):
        yield


@fault("postgres", 2, 4)
def postgres_is_read_only(scene: Scene) -> Iterator[None]:
    setting = "default_transaction_read_only"
    with _altered(scene, "DATABASE", scene.servers.database, f"SET {setting} = on", f"RESET {setting}"):
        yield
    scene.servers.cut_connections()


@fault("postgres", 2, 4)
def postgres_says_that_it_starts_up(scene: Scene) -> Iterator[None]:
    with scene.servers.postgres_proxy.starting_up():
        scene.servers.cut_connections()
        yield


@fault("postgres", 2, 5)
def postgres_far_away(scene: Scene) -> Iterator[None]:
    with scene.servers.postgres_proxy.slow(SLOW_S):
        yield


@fault("redis", 1, 4)
def redis_stopped(scene: Scene) -> Iterator[None]:
    scene.servers.redis.stop()
    yield
    scene.servers.redis.start()


@fault("redis", 0.5, 3)
def redis_killed(scene: Scene) -> Iterator[None]:
    scene.servers.redis.kill()
    yield
    scene.servers.redis.start()


@fault("redis", 2, 5)
def redis_hangs(scene: Scene) -> Iterator[None]:
    assert scene.servers.redis.pid
    with frozen_family(scene.servers.redis.pid):
        yield


@fault("redis", 3, 6)
def redis_full(scene: Scene) -> Iterator[None]:
    with scene.servers.client() as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.8))
        yield
        client.config_set("maxmemory", 0)


@fault("redis", 0, 0)
def redis_connections_cut(scene: Scene) -> Iterator[None]:
    with scene.servers.client() as client, suppress(RedisError):
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
    yield


@fault("redis", 0, 0)
def redis_forgets_the_scripts(scene: Scene) -> Iterator[None]:
    with scene.servers.client() as client:
        client.script_flush()
    yield


@fault("redis", 2, 5)
def redis_far_away(scene: Scene) -> Iterator[None]:
    with scene.servers.redis_proxy.slow(SLOW_S):
        yield


def _frozen(process: SupervisedProcess) -> AbstractContextManager[None]:
    """Freeze a process and its children for the length of the block, unless it has ended."""
    return frozen_family(process.pid) if process.pid else nullcontext()


@contextmanager
def _altered(scene: Scene, kind: str, name: str, change: str, back: str) -> Iterator[None]:
    """Alter a role or a database for the length of the block, and cut the connections made before."""
    alter = sql.SQL("ALTER {} {} ").format(sql.SQL(kind), sql.Identifier(name))
    with scene.servers.admin() as admin:
        admin.execute(alter + sql.SQL(change))
        scene.servers.cut_connections()
        yield
        admin.execute(alter + sql.SQL(back))
