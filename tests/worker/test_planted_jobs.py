"""An attacker who can write to Redis can plant jobs: no worker imports, calls or fetches what they name."""

import json
import os
import pickle
import socket
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis
from rq import Callback, Queue, Repeat, Retry
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.rate_limit import RateLimit
from rq.registry import DeferredJobRegistry, ReadyJobRegistry
from rq.webhook import Webhook

from cli.dev.servers import HOST
from tests.support.payloads import body, user, user_event
from tests.support.queue import RqView, enqueue, put_job
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from tests.support.supervised_process import SupervisedProcess, has_begun, running, supervised_worker
from tests.support.waiting import wait_until
from worker.queue.maintenance import SEEN_KEY, STUCK_AFTER_S
from worker.queue.rq_format import (
    FAILED_KEY,
    INTERMEDIATE_KEY,
    JOB_FUNCTION,
    JOB_PREFIX,
    MAX_BODY_BYTES,
    MAX_CALL_BYTES,
    QUEUE_KEY,
    SCHEDULED_KEY,
    STARTED_KEY,
    ForeignJobError,
    decode_call,
    encode_call,
)

START_S = 30.0
SOON_S = 20.0
A_WHILE_S = 5.0  # in which a worker has done each of its duties
TRAP = "import pathlib\npathlib.Path({!r}).touch()\ndef spring(*args, **kwargs):\n    pass\n"
FOREIGN = "ForeignJobError: the job does not call this queue's function"
TOO_LARGE = "ForeignJobError: the job's data is larger than any delivery"
MB = 1024 * 1024
BOMB_MB = 1024
ODD_ID = b"\xff\x00 ../\x1b[31m:\n%s{}"

Plant = Callable[[Redis, "Lure"], None]


class Lure:
    """What planted jobs name: a module that leaves a trace, a URL at which the test listens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trace = directory / "sprung"
        (directory / "trap.py").write_text(TRAP.format(str(self.trace)))
        self._listener = socket.create_server((HOST, 0))
        self._listener.setblocking(False)
        url = f"http://{HOST}:{self._listener.getsockname()[1]}/called"
        trap = Callback("trap.spring")
        self.named: dict[str, Any] = {
            "on_success": trap,
            "on_failure": trap,
            "on_stopped": trap,
            "webhooks": [Webhook(url, "failed", method="POST"), Webhook(url, "finished")],
        }

    def assert_untouched(self) -> None:
        """Nothing was imported or called, and no connection came."""
        assert not self.trace.exists()
        with pytest.raises(BlockingIOError):
            self._listener.accept()

    def close(self) -> None:
        self._listener.close()


class _Pickled:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._path}",)


@pytest.fixture
def lure() -> Iterator[Lure]:
    with tempfile.TemporaryDirectory(prefix="clerk-sync-") as directory:
        lure = Lure(Path(directory))
        yield lure
        lure.close()


@pytest.fixture
def worker(make_settings: MakeSettings, lure: Lure) -> SupervisedProcess:
    """A worker, not started yet, that could import the trap."""
    env = {**environment(make_settings()), "PYTHONPATH": str(lure.directory), "LOG_FORMAT": "json"}
    return supervised_worker("worker", env, lure.directory)


def call(
    *arguments: object, function: str = "trap.spring", instance: object = None, **named: object
) -> bytes:
    return zlib.compress(json.dumps((function, instance, arguments, named)).encode())


def bomb(megabytes: int) -> bytes:
    """Return zlib data that becomes so many MB of zeros: what one of them is packed into, again and again.

    Source of the two bytes of the head and of the checksum at the end: RFC 1950.
    """
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    one = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = megabytes * MB % 65521 << 16 | 1
    return b"\x78\xda" + one * megabytes + packer.flush() + checksum.to_bytes(4, "big")


def in_the_queue(redis: Redis, lure: Lure) -> dict[str, str]:
    """Plant jobs in the queue; return the reason that each is to fail for."""
    queue = Queue("clerk", connection=redis, serializer="json")
    queue.enqueue("os.system", f"touch {lure.trace}", job_id="system", **lure.named)
    queue.enqueue("trap.spring", job_id="trap", retry=Retry(max=100_000), **lure.named)
    queue.enqueue("trap.spring", job_id="repeat", repeat=Repeat(times=1000, interval=0), **lure.named)
    queue.enqueue("trap.spring", job_id="limited", rate_limit=RateLimit("x", 1), **lure.named)
    put_job(redis, "pickle", zlib.compress(pickle.dumps(("trap.spring", None, (_Pickled(lure.trace),), {}))))
    put_job(redis, "raw-pickle", pickle.dumps(_Pickled(lure.trace)))
    put_job(redis, "instance", call("{}", function=JOB_FUNCTION, instance={"py/object": "trap.spring"}))
    put_job(redis, "keyword", call("{}", function=JOB_FUNCTION, on_failure="trap.spring"))
    put_job(redis, "nearly", call("{}", function=JOB_FUNCTION + ".__globals__"))
    put_job(redis, "deep", b"[" * MB)
    put_job(redis, "nothing", b"")
    put_job(redis, ODD_ID, call())
    put_job(redis, "many-retries", call(), retries_left=10**8, retry_intervals=json.dumps([0] * 100_000))
    put_job(redis, "dependent", call(), dependency_ids='["own"]', allow_dependency_failures=1)
    foreign = ["system", "trap", "repeat", "limited", "pickle", "raw-pickle", "instance", "keyword", "nearly"]
    foreign += ["deep", "nothing", ODD_ID.decode(errors="surrogateescape"), "many-retries", "dependent"]
    put_job(redis, "bomb", bomb(BOMB_MB))
    put_job(redis, "own-bomb", zlib.compress(encode_call("x" * MAX_CALL_BYTES)))
    return dict.fromkeys(foreign, FOREIGN) | dict.fromkeys(["bomb", "own-bomb"], TOO_LARGE)


def elsewhere(redis: Redis, lure: Lure) -> dict[str, str]:
    """Plant jobs where plain RQ workers and schedulers leave them; return why each is to fail."""
    ids = ("scheduled", "abandoned", "stuck", "deferred", "ready")
    for id_ in ids:
        job = Job.create(
            "trap.spring", id=id_, connection=redis, serializer="json", origin="clerk", **lure.named
        )
        job.save()
    redis.hset(f"{JOB_PREFIX}scheduled", "status", "scheduled")
    redis.zadd(SCHEDULED_KEY, {"scheduled": 1})
    redis.hset(f"{JOB_PREFIX}abandoned", "status", "started")
    redis.zadd(STARTED_KEY, {"abandoned:an-execution": 1})
    redis.hset(f"{JOB_PREFIX}stuck", "status", "queued")
    redis.rpush(INTERMEDIATE_KEY, "stuck")
    redis.zadd(SEEN_KEY, {"stuck": time.time() - STUCK_AFTER_S - 1})
    rq_has_seen = IntermediateQueue(QUEUE_KEY, redis).get_first_seen_key("stuck")
    redis.set(rq_has_seen, 1)
    for id_, registry in (("deferred", DeferredJobRegistry), ("ready", ReadyJobRegistry)):
        redis.zadd(registry.key_template.format("clerk"), {id_: 1})
    return dict.fromkeys(["scheduled", "abandoned", "stuck"], FOREIGN)


def reasons(rq: RqView) -> dict[str, str]:
    """Return the reason of each failed job."""
    found = {}
    entries: Any = rq.redis.zrange(FAILED_KEY, 0, -1)
    for entry in entries:
        meta = rq.redis.hget(JOB_PREFIX.encode() + entry, "meta") or b"{}"
        found[entry.decode(errors="surrogateescape")] = str(json.loads(meta).get("reason"))
    return found


def test_nothing_that_a_job_names_is_imported_called_or_fetched(
    worker: SupervisedProcess, lure: Lure, redis: Redis, rq: RqView, connection: psycopg.Connection[Any]
) -> None:
    before = enqueue(redis, user_event(data=user("user_1")))
    wanted = in_the_queue(redis, lure) | elsewhere(redis, lure)
    own = Queue("clerk", connection=redis, serializer="json").enqueue(
        JOB_FUNCTION, body(user_event(data=user("user_2"))).decode(), job_id="own", **lure.named
    )
    after = enqueue(redis, user_event(data=user("user_3")))
    with running(worker):
        wait_until(lambda: has_begun(worker), START_S, worker.text)
        wait_until(lambda: reasons(rq).keys() >= wanted.keys(), SOON_S, worker.text)
        wait_until(lambda: rq.status(after) == "finished", SOON_S, worker.text)
        time.sleep(A_WHILE_S)
        assert worker.running
        peak = peak_mb(worker)
    assert reasons(rq) == wanted
    assert [rq.status(id_) for id_ in (before, own.id, after)] == ["finished"] * 3
    assert [redis.llen(key) for key in (QUEUE_KEY, INTERMEDIATE_KEY)] == [0, 0]
    assert [redis.zcard(key) for key in (STARTED_KEY, SCHEDULED_KEY)] == [0, 0]
    assert {id_ for (id_,) in connection.execute("SELECT clerk_id FROM users")} == {
        "user_1",
        "user_2",
        "user_3",
    }
    lure.assert_untouched()
    assert peak < 400, "a bomb of 1 GiB was inflated"


def peak_mb(worker: SupervisedProcess) -> float:
    """Return the most memory that a process ever had in use. Source: proc(5)."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


COMMANDS = [
    {"command": "kill-horse"},
    {"command": "stop-job", "job_id": "own"},
    {"command": "stop-job"},
    {"command": "stop-execution", "job_id": "own", "execution_id": "1"},
    {"command": "trap.spring"},
    {"command": ["os.system"]},
    {},
    [],
    None,
]


def test_no_command_over_redis_does_more_than_stop_a_worker(
    worker: SupervisedProcess, lure: Lure, redis: Redis, rq: RqView
) -> None:
    with running(worker):
        wait_until(lambda: has_begun(worker), START_S, worker.text)
        [known] = rq.workers()
        channel = known.pubsub_channel_name
        messages: list[Any] = [*map(json.dumps, COMMANDS), b"\xff", pickle.dumps(_Pickled(lure.trace))]
        for message in messages:
            assert redis.publish(channel, message) == 1
        id_ = enqueue(redis, user_event(data=user("user_1")))
        wait_until(lambda: rq.status(id_) == "finished", SOON_S, worker.text)
        assert worker.running
        redis.publish(channel, json.dumps({"command": "shutdown"}))
        wait_until(lambda: not worker.running, START_S, worker.text)
    assert worker.exit_status == 0
    lure.assert_untouched()


@pytest.mark.parametrize(
    "text",
    ["é" * (MAX_BODY_BYTES // 2), "😀" * (MAX_BODY_BYTES // 4), '"' * MAX_BODY_BYTES, "\n" * MAX_BODY_BYTES],
    ids=["two bytes", "four bytes", "quotes", "lines"],
)
def test_the_largest_body_that_is_received_can_be_read_again(text: str) -> None:
    assert len(text.encode()) == MAX_BODY_BYTES
    assert decode_call(zlib.compress(encode_call(text), 1)) == text


@pytest.mark.parametrize("shape", ["zeros", "text", "lists"])
def test_a_zlib_bomb_is_foreign_and_takes_no_more_memory_than_a_large_delivery(shape: str) -> None:
    before, after = encode_call("").split(b'""')
    match shape:
        case "zeros":
            data = bomb(256)
        case "text":
            data = zlib.compress(encode_call("x" * (64 * MB)))
        case _:
            data = zlib.compress(before + b"[]," * (MAX_CALL_BYTES // 3 - 100) + b"[]" + after)
    tracemalloc.start()
    with pytest.raises(ForeignJobError):
        decode_call(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_CALL_BYTES
