"""Limits the connections of one process: closes old ones to make room for new ones.

Only Linux shows which connections are open and when data was last sent; elsewhere none is closed here.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

OPEN_FILES = "/proc/self/fd"
# linux/tcp.h, struct tcp_info: tcpi_last_data_sent, in ms since the last sent data, or since the accept.
LAST_DATA_SENT = struct.Struct("=44xI")
SUPPORTED = sys.platform == "linux"


class Limits(NamedTuple):
    """The limits for clients of a process; tests use shorter times.

    body_timeout_s   how long a body may take to arrive; also how long the connections of a late body's
                     address may be silent
    connections      open connections at a time; more wait to be accepted
    scarce_from      the share of `connections` above which they are scarce
    scarce_s         how long a connection may be held while they are scarce
    look_every_s     the interval of these checks
    """

    body_timeout_s: float = 10.0
    connections: int = 288
    scarce_from: float = 0.75
    scarce_s: float = 1.25
    look_every_s: float = 0.25


class Connections:
    """The connections to one port. While they are `scarce`, those held longest are closed to make room."""

    def __init__(self, port: int, limits: Limits) -> None:
        self.scarce = False
        self._port = port
        self._limits = limits
        self._keep = int(limits.connections * limits.scarce_from)
        self._held_since: dict[int, float] = {}

    def make_room(self) -> None:
        """Close the connections held longest, if held for `scarce_s`, until connections are not scarce.

        A connection is held since data was last sent on it before it was first seen while connections were
        scarce. Later data does not count, so a client cannot keep one by sending or reading a byte now and
        then.
        """
        self.scarce = len(os.listdir(OPEN_FILES)) > self._keep
        if not self.scarce:
            self._held_since.clear()
            return
        now = time.monotonic()
        self._held_since = {
            one.inode: self._held_since.get(one.inode, now - one.silent_s) for one in self._open()
        }
        longest_first = sorted(self._held_since.items(), key=lambda held: held[1])
        too_many = longest_first[: max(0, len(longest_first) - self._keep)]
        self._close({inode for inode, since in too_many if now - since > self._limits.scarce_s})

    def close_silent(self, addresses: Collection[str], silent_s: float) -> None:
        """Close the connections from these addresses on which nothing was sent for that long."""
        self._close(
            {one.inode for one in self._open() if one.address in addresses and one.silent_s > silent_s}
        )

    def _close(self, inodes: Collection[int]) -> None:
        for one in self._open() if inodes else ():
            if one.inode in inodes:
                with suppress(OSError):
                    one.socket.shutdown(socket.SHUT_RDWR)

    def _open(self) -> Iterator["_Connection"]:
        """Yield each connection; its socket is a duplicate, closed when the next one is requested."""
        for name in os.listdir(OPEN_FILES):
            with suppress(OSError), _duplicate(int(name)) as duplicate:  # it may be closed, or no socket
                if duplicate.getsockname()[1:2] == (self._port,):
                    address = duplicate.getpeername()[0]  # OSError for the listening socket
                    inode = os.fstat(duplicate.fileno()).st_ino
                    yield _Connection(inode, address, _silent_s(duplicate), duplicate)


class _Connection(NamedTuple):
    inode: int
    address: str
    silent_s: float
    socket: socket.socket


def _duplicate(number: int) -> socket.socket:
    # The server may close the original at any time; its number may then belong to another connection.
    duplicate = os.dup(number)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _silent_s(connection: socket.socket) -> float:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LAST_DATA_SENT.size)
    (milliseconds,) = LAST_DATA_SENT.unpack(info)
    return float(milliseconds) / 1000
