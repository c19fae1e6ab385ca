"""Corrupted events with genuine signatures: no process ends, none is lost, each failed job has a reason."""

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.corpus import bodies, corpus
from tests.faults.service import Service
from tests.support import http
from tests.support.deliveries import PATH, signed
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
    """With ORGANIZATION_SOURCE=membership, organization events are handled and metadata is not read."""
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
    assert failures(each_service, statuses) == ["Unreadable: the event's data.id is not a Clerk id"]


def test_nothing_that_is_signed_ends_a_process_or_is_lost_or_answered_late(each_service: Service) -> None:
    @settings(no_deadline, max_examples=EXAMPLES)
    @given(st.lists(bodies(), min_size=1, max_size=MOST_AT_ONCE))
    def look(contents: list[bytes]) -> None:
        statuses = deliver(each_service, {svix_id(): content for content in contents})
        assert set(statuses.values()) <= {IGNORED, QUEUED, REFUSED}
        reasons = failures(each_service, statuses)
        assert [reason for reason in reasons if not reason.startswith("Unreadable: ")] == []
        assert all(process.running for process in each_service.processes)

    look()


def deliver(service: Service, contents: Mapping[str, bytes]) -> dict[str, int]:
    """Deliver each body under its svix-id and return the statuses."""
    with http.Client(base_url=service.url(""), timeout=ANSWER_S) as client:
        return {
            id_: client.post(PATH, content=content, headers=signed(content, id_=id_)).status_code
            for id_, content in contents.items()
        }


def failures(service: Service, statuses: Mapping[str, int]) -> list[str]:
    """Wait until every queued delivery is finished or failed, and return the reasons of those that failed."""
    rq = RqView(service.redis)
    ids = [id_ for id_, status in statuses.items() if status == QUEUED]

    def where() -> dict[str, str]:
        return {id_: rq.status(id_) for id_ in ids}

    def is_settled() -> bool:
        return set(where().values()) <= {"finished", "failed"}

    wait_until(is_settled, SETTLED_WITHIN_S, lambda: f"{where()}\n{service.logs()}")
    return [rq.job(id_).meta["reason"] for id_, status in where().items() if status == "failed"]
