"""Svix with shorter waits: delivers at least once, again after any answer but 2xx, concurrently, in no order.

Svix waits 5 s, 5 min, 30 min and longer between its attempts, and 15 s for an answer. Here the pauses are
PAUSES_S, the limit is ANSWER_S, and a delivery is repeated without end.
"""

import heapq
import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple, Self

from cli.dev.servers import HOST
from tests.support.deliveries import PATH, signed
from tests.support.payloads import body
from tests.support.reference_model import SentEvent

THREADS = 12  # each has a connection to each port
ANSWER_S = 8.0
PAUSES_S = (0.2, 0.5, 1.0, 2.0)
SPREAD = 0.2


class Attempt(NamedTuple):
    """When a delivery is due, and how often it was tried before; `number` orders deliveries due at once."""

    due: float
    number: int
    tried: int
    delivery: SentEvent


class Svix:
    """Delivers in threads for the length of the block.

    `accepted_at` has the time (s since the epoch) of the first 2xx of each svix-id. `answers` counts the
    statuses, and the names of errors without an answer. `answered_in` has the time to each answer, in s. Each
    attempt goes to one of `ports`, which may change. `pauses_s` are the pauses between attempts; the last one
    repeats.
    """

    def __init__(self, ports: Sequence[int], random: Random, *, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self.accepted_at: dict[str, float] = {}
        self.answers: Counter[str] = Counter()
        self.answered_in: list[float] = []
        self.ports = ports
        self._random = random
        self._pauses_s = pauses_s
        self._heap: list[Attempt] = []
        self._open = 0
        self._count = 0
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(2 * ANSWER_S)

    def send(
        self, deliveries: Iterable[SentEvent], *, after_s: float = 0, over_s: float = 0, twice: float = 0
    ) -> None:
        """Deliver each at a random moment within `over_s` seconds, and the share `twice` of them twice."""
        begins = time.monotonic() + after_s
        with self._changed:
            for delivery in deliveries:
                times = 2 if self._random.random() < twice else 1
                for _ in range(times):
                    self._push(begins + self._random.uniform(0, over_s), 0, delivery)
            self._changed.notify_all()

    @property
    def undelivered(self) -> int:
        """How many deliveries have not been accepted yet."""
        with self._changed:
            return self._open

    def _push(self, due: float, tried: int, delivery: SentEvent) -> None:
        self._count += 1
        self._open += tried == 0
        heapq.heappush(self._heap, Attempt(due, self._count, tried, delivery))

    def _work(self) -> None:
        connections: dict[int, http.client.HTTPConnection] = {}
        while (attempt := self._next()) is not None:
            began = time.monotonic()
            answer = self._deliver(attempt, connections)
            self._note(attempt, answer, time.monotonic() - began)
        for connection in connections.values():
            connection.close()

    def _next(self) -> Attempt | None:
        with self._changed:
            while not self._closing:
                wait_s = self._heap[0].due - time.monotonic() if self._heap else 1.0
                if wait_s <= 0:
                    return heapq.heappop(self._heap)
                self._changed.wait(wait_s)
        return None

    def _deliver(self, attempt: Attempt, connections: dict[int, http.client.HTTPConnection]) -> str:
        port = self._random.choice(self.ports)
        content = body(attempt.delivery.event)
        headers = signed(content, id_=attempt.delivery.svix_id)
        connection = connections.setdefault(port, http.client.HTTPConnection(HOST, port, timeout=ANSWER_S))
        try:
            connection.request("POST", PATH, content, headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return type(error).__name__
        return str(response.status)

    def _note(self, attempt: Attempt, answer: str, took_s: float) -> None:
        with self._changed:
            self.answers[answer] += 1
            if answer.isdigit():
                self.answered_in.append(took_s)
            if answer.startswith("2"):
                self.accepted_at.setdefault(attempt.delivery.svix_id, time.time())
                self._open -= 1
                return
            pause_s = self._pauses_s[min(attempt.tried, len(self._pauses_s) - 1)]
            pause_s *= self._random.uniform(1 - SPREAD, 1 + SPREAD)
            self._push(time.monotonic() + pause_s, attempt.tried + 1, attempt.delivery)
            self._changed.notify()
