"""The production server: granian, with a process for each of WEB_WORKERS.

Why granian, and what was measured: docs/decisions/001-which-wsgi-server.md.
"""

import errno
import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from functools import partial

import structlog
from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

from config import ServiceError, Settings
from web.app import start
from web.body_timeout import BodyTimeout
from web.connections import Limits
from web.signature import svix_webhook

log = structlog.get_logger("web")

BACKLOG = 1024
HEADER_TIMEOUT_MS = 75_000  # Also how long a connection may idle: load balancers commonly allow 60 s.
HEADER_LIMIT_BYTES = 16 * 1024  # as in Node; a process may buffer that much for every connection
STOP_TIMEOUT_S = 6  # A delivery takes 5 s at most, and a container is killed 10 s after its SIGTERM.
PARENT_CHECK_S = 1.0
DEFAULT_LIMITS = Limits()


class CannotListen(ServiceError):
    """The receiver cannot listen on the port; the message says why."""


def serve(settings: Settings, limits: Limits = DEFAULT_LIMITS) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in progress and return.

    A process that dies is replaced; one that dies again within seconds ends the server with SystemExit(1).
    Raises CannotListen if the address cannot be used.
    """
    settings = settings.model_copy(update={"port": _free_port(settings.host, settings.port)})
    _share_what_is_loaded()
    log.info("receiver started", host=settings.host, port=settings.port, processes=settings.web_workers)
    server = Granian(
        "web",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.WSGI,
        workers=settings.web_workers,
        # A body that arrives slowly occupies a thread until web.body_timeout ends it. So there may be one for
        # every connection; granian starts them on demand, and ends idle ones.
        blocking_threads=limits.connections,
        backpressure=limits.connections,
        backlog=BACKLOG,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(
            header_read_timeout=HEADER_TIMEOUT_MS, max_buffer_size=HEADER_LIMIT_BYTES
        ),
        websockets=False,
        # Only errors, in the log of this service: `web.webhook` writes the line of each delivery.
        log_level=LogLevels.error,
        log_dictconfig={"loggers": {"_granian": {"propagate": True}}},
        respawn_failed_workers=True,
        workers_kill_timeout=STOP_TIMEOUT_S,
    )
    server.serve(target_loader=partial(_start_process, settings, limits, os.getpid()), wrap_loader=False)


def _share_what_is_loaded() -> None:
    """Make the processes forks, which share the memory of what this process has loaded."""
    svix_webhook()
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)
        gc.freeze()  # the garbage collector of each process would write to the shared pages


def _start_process(settings: Settings, limits: Limits, parent: int) -> BodyTimeout:
    threading.Thread(target=_stop_without_parent, args=(parent,), daemon=True).start()
    app = BodyTimeout(start(settings), settings.port, limits)
    app.watch()
    gc.freeze()  # the garbage collector need not scan the objects loaded so far
    return app


def _stop_without_parent(parent: int) -> None:
    # Every process has its own listening socket on the port. After its parent was killed, a process
    # would continue to receive a share of the deliveries beside the next server.
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _free_port(host: str, port: int) -> int:
    """Return the port; for 0, one that is free now. Raises CannotListen.

    Every process binds the port itself, so all need the same number.
    """
    # Granian shares its port (SO_REUSEPORT), so a second server would start without an error.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        where = f"port {port}" if error.errno == errno.EADDRINUSE else f"HOST {host}, port {port}"
        raise CannotListen(f"cannot listen on {where}: {os.strerror(error.errno or 0)}") from None
