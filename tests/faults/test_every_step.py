"""A worker is killed, or frozen, at each step of a batch, and another one takes over."""

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from redis import Redis

import config
from tests.faults.chaos import compare
from tests.faults.crashing_worker import STEPS
from tests.faults.random_histories import random_histories
from tests.faults.servers import Servers
from tests.faults.service import what_is_left
from tests.support.directories import open_directory
from tests.support.processes import frozen_family
from tests.support.queue import RqView, delivery
from tests.support.reference_model import SentEvent
from tests.support.stack import environment
from tests.support.supervised_process import SupervisedProcess, has_begun, running, supervised_worker
from tests.support.waiting import wait_until
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import RETRY_INTERVALS_S
from worker.redis_client import worker_redis

WORLDS = 6
BATCH_SIZE = 5
CRASHING_WORKER = "tests.faults.crashing_worker"
RIGHT_WITHIN_S = 30
PATIENCE_S = 60
IDLE_S = 2  # longer than a worker waits in Redis for a job before it asks again
SIGNALS = ("KILL", "STOP")

Recoveries = dict[str, "Future[list[float]]"]


@pytest.fixture(scope="module")
def recoveries(servers: Servers) -> Iterator[Recoveries]:
    """Run all steps at the same time, each with its own database."""
    trials = [servers.fresh(redis_number=number, batch_size=BATCH_SIZE) for number in range(len(STEPS))]
    with ThreadPoolExecutor(len(STEPS)) as threads:
        yield {
            step: threads.submit(recover, settings, step)
            for step, settings in zip(STEPS, trials, strict=True)
        }


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_killed_or_frozen_at_any_step_leaves_all_right_within_thirty_seconds(
    recoveries: Recoveries, step: str
) -> None:
    assert max(recoveries[step].result(PATIENCE_S * 4)) < RIGHT_WITHIN_S


def recover(settings: config.Settings, step: str) -> list[float]:
    """Kill a worker, then freeze one; return the seconds until another had applied everything each time."""
    env = environment(settings)
    given: list[SentEvent] = []
    took_s = []
    with (
        open_directory() as directory,
        closing(worker_redis(settings)) as redis,
        running(supervised_worker("other", env, directory)) as other,
    ):
        wait_until(lambda: has_begun(other), PATIENCE_S, other.text)
        for number, name in enumerate(SIGNALS):
            seed = STEPS.index(step) * len(SIGNALS) + number
            deliveries = list(chain.from_iterable(random_histories(seed, WORLDS)))
            first, rest = deliveries[::2], deliveries[1::2]
            struck = supervised_worker(f"struck-{name}", env, directory, CRASHING_WORKER, step, name)
            with ExitStack() as stack:
                with paused(other):
                    fill(redis, first)
                    stack.enter_context(running(struck))
                    wait_until(partial(is_struck, struck), PATIENCE_S, struck.text)
                    at = time.monotonic()
                assert struck.exit_status in (None, -signal.SIGKILL), struck.text()
                wait_until(lambda: not what_is_left(redis), PATIENCE_S, other.text)
                took_s.append(time.monotonic() - at)
                compare(settings, given + first)
                struck.signal(signal.SIGCONT)  # a frozen one resumes, and does no harm
                fill(redis, rest)
                wait_until(lambda: not what_is_left(redis), PATIENCE_S, other.text)
            given += deliveries
            compare(settings, given)
        rq = RqView(redis)
        assert [rq.places(one.svix_id) for one in given] == [["finished"]] * len(given)
        assert {rq.job(one.svix_id).retries_left for one in given} == {len(RETRY_INTERVALS_S)}
        assert "released jobs of a dead worker" in other.text()
    return took_s


@contextmanager
def paused(worker: SupervisedProcess) -> Iterator[None]:
    """Let a worker take no jobs for the length of the block."""
    with frozen_family(worker.living_pid):
        time.sleep(IDLE_S)  # its blocking call ends in Redis only then
        yield


def fill(redis: Redis, deliveries: Sequence[SentEvent]) -> None:
    """Queue deliveries. A receiver's client would time out while all these processes start."""
    with closing(DeliveryQueue(redis)) as receiver:
        for svix_id, event, received_at in deliveries:
            receiver.enqueue(delivery(event, id_=svix_id, received_at=received_at))


def is_struck(process: SupervisedProcess) -> bool:
    """Return whether a process is dead or frozen. Source of the state's letter: proc(5)."""
    if process.pid is None:
        return True
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"
