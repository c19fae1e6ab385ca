"""Limits the log lines about unverified requests: the first of a minute, then one with their number."""

import threading

import structlog

FIRST = 20
PERIOD_S = 60.0

_log = structlog.get_logger("web.webhook")


class LineLimit:
    """Allows FIRST lines in `period_s`, and counts the others; for all threads of one process."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()
        self._written = 0
        self._left_out = 0

    def allows(self) -> bool:
        """Say whether another line may be written; if not, count it."""
        with self._lock:
            if self._written == 0:
                timer = threading.Timer(self._period_s, self._end_period)
                timer.daemon = True
                timer.start()
            if self._written < FIRST:
                self._written += 1
                return True
            self._left_out += 1
            return False

    def _end_period(self) -> None:
        with self._lock:
            left_out, self._left_out, self._written = self._left_out, 0, 0
        if left_out:
            _log.warning("refused deliveries not logged one by one", count=left_out, seconds=self._period_s)
