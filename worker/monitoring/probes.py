"""Probes: each checks one part of the service, all in parallel threads, within a deadline."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from config import ServiceError
from worker.redis_causes import explain

LIMIT_S = 2.5

Facts = Mapping[str, Any]


class ProbeFailed(ServiceError):
    """A part answered and reports a problem. The message says what to do; `facts` are what is known."""

    retryable = True

    def __init__(self, message: str, facts: Facts | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


class ProbeResult(NamedTuple):
    """The answer of one part, and its ms; `error` is None if there is no problem."""

    facts: Facts
    ms: float
    error: str | None


class Probe:
    """One check, in a thread of its own.

    While an answer is outstanding, the check is not started again. So a part that hangs occupies one thread,
    however often it is checked. Unlike an executor's thread, it does not delay the end of the process.
    """

    def __init__(self, name: str, ask: Callable[..., Facts | None]) -> None:
        self.name = name
        self._ask = ask
        self._thread: Thread | None = None
        self._asked: SimpleQueue[tuple[Future[ProbeResult], tuple[object, ...]]] = SimpleQueue()
        self._last: tuple[Future[ProbeResult], tuple[object, ...]] = (Future(), ())
        self._last[0].cancel()

    def start(self, *about: object) -> Future[ProbeResult]:
        """Start the check, unless the answer to the same question is outstanding."""
        future, asked = self._last  # one tuple, because other threads read and replace it too
        if future.done() or asked != about:
            future = Future()
            self._last = (future, about)
            self._asked.put((future, about))
            if self._thread is None:
                self._thread = Thread(target=self._answer_all, name=f"status-{self.name}", daemon=True)
                self._thread.start()
        return future

    def _answer_all(self) -> None:
        while True:
            future, about = self._asked.get()
            if future.set_running_or_notify_cancel():
                future.set_result(self._timed(*about))

    def _timed(self, *about: object) -> ProbeResult:
        began = time.perf_counter()
        facts: Facts = {}
        error: str | None = None
        try:
            facts = self._ask(*about) or {}
        except ProbeFailed as trouble:
            facts, error = trouble.facts, str(trouble)
        except ServiceError as trouble:
            error = str(trouble)
        except RedisError as trouble:
            error = explain(trouble)
        except Exception as fault:  # for example, a job of another program cannot be read
            error = f"unexpected {type(fault).__name__}"
        return ProbeResult(facts, round((time.perf_counter() - began) * 1000, 1), error)


def ask(*probes: Probe, **about: object) -> dict[str, ProbeResult]:
    """Run all probes in parallel; return their answers by name, after LIMIT_S at the latest.

    A keyword is the argument of the probe of that name.
    """
    deadline = time.monotonic() + LIMIT_S
    given = {name: (argument,) for name, argument in about.items()}
    pending = {probe.name: probe.start(*given.get(probe.name, ())) for probe in probes}
    return {name: _answer(future, deadline - time.monotonic()) for name, future in pending.items()}


def _answer(future: Future[ProbeResult], limit_s: float) -> ProbeResult:
    try:
        return future.result(max(0.0, limit_s))
    except FutureTimeout:
        future.cancel()  # a check that waits for an older one must not start later
        return ProbeResult(
            {},
            LIMIT_S * 1000,
            f"no answer within {LIMIT_S} s: it hangs, or the network on the way to it does",
        )
    except CancelledError:  # another thread asked the same question, and gave up
        return ProbeResult({}, LIMIT_S * 1000, "no answer in time")
