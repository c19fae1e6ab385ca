"""Runs calls in threads that do not delay the end of the process: one call, or several in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import islice
from typing import Any, TypeVar

from worker.shutdown import Stopped, StopSignal

AHEAD = 4
LOOK_EVERY_S = 0.2
LINGER_S = 2.0

T = TypeVar("T")
R = TypeVar("R")


def in_background(work: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Start `work` in a daemon thread: the end of the process does not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future


def await_result(future: "Future[T]", stopping: StopSignal) -> T:
    """Return what the future holds. Raises Stopped as soon as the process is asked to stop."""
    while not stopping.requested:
        try:
            return future.result(LOOK_EVERY_S)
        except FutureTimeout:
            if future.done():
                raise
    raise Stopped("stopped")


def results(
    work: Callable[[T], R], items: Iterable[T], stopping: StopSignal, at_once: int = AHEAD
) -> Iterator[R]:
    """Yield `work(item)` for every item, in order; a few calls run ahead in threads.

    An item's exception is raised after the results of the items before it. Raises Stopped.
    """
    running: deque[Future[R]] = deque()
    following = iter(items)
    failure: Exception | None = None
    try:
        while failure is None:
            try:
                running.append(in_background(work, next(following)))
            except StopIteration:
                break
            except Exception as error:
                failure = error
            if len(running) == at_once:
                yield await_result(running[0], stopping)
                running.popleft()
        while running:
            yield await_result(running[0], stopping)
            running.popleft()
    finally:
        wait(running, LINGER_S)  # a running call uses connections that the caller is about to close
    if failure is not None:
        raise failure


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
