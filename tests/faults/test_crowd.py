"""A crowd of 1,200 connections, in some of the ways. `make faults` tries all ways."""

import sys

import pytest

from tests.faults.crowd import beside, check
from tests.faults.service import Service

SECONDS = 4
SOON_S = 5.0  # on a machine that runs other tests too
SHORT = [
    "a GET every 4 s",
    "half a head",
    "a body, dripping",
    "all but the last byte of 1 MiB",
    "1 MiB, whole and forged",
    "readiness without a pause",
    "all but the last byte of 16 kB",
    "100 GETs in a row, read slowly",
]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no connection is closed to make room")
@pytest.mark.parametrize("way", SHORT)
def test_a_crowd_keeps_no_delivery_waiting_and_takes_little_memory(service: Service, way: str) -> None:
    check(beside(service, way, SECONDS), SOON_S)
