"""Limits the memory that allocators keep per thread: a receiver may have a thread for every connection."""

import ctypes
import os
import sys

# Granian's own allocator is jemalloc, which keeps up to 70 kB of freed memory for each thread that serves a
# connection. It reads this variable when granian is loaded (jemalloc(3), TUNING).
GRANIAN_OPTIONS = "_RJEM_MALLOC_CONF"
NO_THREAD_CACHE = "tcache:false"
# From this size on glibc returns freed memory to the system. By default this threshold grows to the largest
# body that was freed, and every arena keeps that much (mallopt(3)).
M_MMAP_THRESHOLD = -3
LARGE_BYTES = 128 * 1024


def bound_thread_memory() -> None:
    """Set both limits for this process and its forks. Call it before granian is imported.

    Measurements: docs/decisions/001-which-wsgi-server.md.
    """
    os.putenv(GRANIAN_OPTIONS, NO_THREAD_CACHE)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
