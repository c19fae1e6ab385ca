"""ORGANIZATION_SOURCE decides whether events of organizations are queued."""

from itertools import product

import pytest
from flask.testing import FlaskClient
from structlog.testing import capture_logs
from werkzeug.test import TestResponse

from tests.support.deliveries import PATH, MakeClient, signed
from tests.support.payloads import ACME, ANN, body, membership_event, organization_event, payload, svix_id
from tests.support.queue import RqView
from worker.clerk.payloads import ORGANIZATION_TYPES


def deliver(client: FlaskClient, content: bytes, id_: str) -> TestResponse:
    return client.post(PATH, data=content, headers=signed(content, id_=id_))


@pytest.mark.parametrize("type_", ORGANIZATION_TYPES)
def test_where_membership_decides_an_event_of_organizations_is_queued_as_it_came(
    make_client: MakeClient, rq: RqView, type_: str
) -> None:
    event = payload(f"organizations/{type_}")
    content, id_ = body(event), svix_id()
    answer = deliver(make_client(organization_source="membership"), content, id_)
    assert (answer.status_code, answer.json) == (202, {"status": "queued"})
    job = rq.job(id_)
    subject = event["data"].get("public_user_data", {}).get("user_id", event["data"]["id"])
    assert job.args == [content.decode()]
    assert job.description == f"{type_} {subject}"
    assert rq.places(id_) == ["queue"]


OTHER_TYPES = ("organization.created", "organizationInvitation.created", "role.updated")


@pytest.mark.parametrize(
    ("source", "type_"),
    [*product(("metadata", "none"), ORGANIZATION_TYPES), *product(("metadata", "membership"), OTHER_TYPES)],
)
def test_other_events_of_organizations_are_ignored(
    make_client: MakeClient, rq: RqView, source: str, type_: str
) -> None:
    id_ = svix_id()
    answer = deliver(make_client(organization_source=source), body(organization_event(type_)), id_)
    assert (answer.status_code, answer.json) == (200, {"status": "ignored"})
    assert rq.places(id_) == []


def test_one_that_names_no_user_is_queued_and_nothing_is_lost(make_client: MakeClient, rq: RqView) -> None:
    client = make_client(organization_source="membership")
    for event in (membership_event(data={}), organization_event(data=["Acme"])):
        id_ = svix_id()
        assert deliver(client, body(event), id_).status_code == 202
        assert rq.job(id_).description == event["type"]


def test_the_log_names_ids_and_nothing_personal(make_client: MakeClient) -> None:
    client = make_client(organization_source="membership")
    with capture_logs() as logs:
        deliver(client, body(membership_event()), svix_id())
        deliver(client, body(organization_event()), svix_id())
    lines = [entry for entry in logs if entry["event"] == "delivery"]
    assert [(line["type"], line["clerk_id"]) for line in lines] == [
        ("organizationMembership.created", ANN),
        ("organization.updated", ACME),
    ]
    assert not any(word in str(logs) for word in ("Acme", "Marisol", "example.com"))
