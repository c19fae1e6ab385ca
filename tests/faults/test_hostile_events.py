"""Whatever is genuinely signed: no process dies of it, nothing is lost, and what is wrong is said."""

import http.client
import time
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.dev.servers import HOST
from cli.samples import signed_headers
from tests.faults.corpus import bodies, corpus
from tests.faults.service import Service
from tests.faults.svix import KEY, PATH
from tests.support.hypothesis_settings import no_deadline
from tests.support.payloads import body, svix_id
from tests.support.queue import RqView
from tests.support.waiting import wait_until
from worker.clerk.payloads import handled_types

EXAMPLES = 60
MOST_AT_ONCE = 25
SETTLED_WITHIN_S = 60
ANSWER_S = 5.0
IGNORED, QUEUED, REFUSED = 200, 202, 400


@pytest.fixture(params=["service", "membership_service"])
def each_service(request: pytest.FixtureRequest) -> Service:
    """With memberships the organizations' events are handled too, and metadata is not read."""
    found: Service = request.getfixturevalue(request.param)
    return found


def test_every_known_shape_is_taken_and_applied_and_only_one_without_an_id_fails(
    each_service: Service,
) -> None:
    events = {svix_id(): event for event in corpus()}
    statuses = deliver(each_service, {id_: body(event) for id_, event in events.items()})
    assert set(statuses.values()) == {IGNORED, QUEUED}
    handled = handled_types(each_service.settings)
    assert [id_ for id_, status in statuses.items() if status == QUEUED] == [
        id_ for id_, event in events.items() if event["type"] in handled
    ]
    assert list(redact_deleted(each_service, statuses)) == [
        "Unreadable: the event's data.id is not a Clerk id"
    ]


def test_nothing_that_is_signed_ends_a_process_or_is_lost_or_answered_late(each_service: Service) -> None:
    @settings(no_deadline, max_examples=EXAMPLES)
    @given(st.lists(bodies(), min_size=1, max_size=MOST_AT_ONCE))
    def look(contents: list[bytes]) -> None:
        statuses = deliver(each_service, {svix_id(): content for content in contents})
        assert set(statuses.values()) <= {IGNORED, QUEUED, REFUSED}
        reasons = redact_deleted(each_service, statuses)
        assert [reason for reason in reasons if not reason.startswith("Unreadable: ")] == []
        assert all(process.running for process in each_service.processes)

    look()


def deliver(service: Service, contents: Mapping[str, bytes]) -> dict[str, int]:
    """Deliver each body under its svix-id and return the statuses."""
    connection = http.client.HTTPConnection(HOST, service.ports[0], timeout=ANSWER_S)
    statuses = {}
    for id_, content in contents.items():
        connection.request("POST", PATH, content, signed_headers(KEY, id_, int(time.time()), content))
        response = connection.getresponse()
        response.read()
        statuses[id_] = response.status
    connection.close()
    return statuses


def redact_deleted(service: Service, statuses: Mapping[str, int]) -> list[str]:
    """Wait until every delivery that was queued is finished or failed, and return why those failed."""
    rq = RqView(service.redis)
    ids = [id_ for id_, status in statuses.items() if status == QUEUED]

    def where() -> dict[str, str]:
        return {id_: rq.status(id_) for id_ in ids}

    def is_settled() -> bool:
        return set(where().values()) <= {"finished", "failed"}

    wait_until(is_settled, SETTLED_WITHIN_S, lambda: f"{where()}\n{service.logs()}")
    return [rq.job(id_).meta["reason"] for id_, status in where().items() if status == "failed"]
