import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cli import samples
from cli.dev.servers import free_port
from config import decode_signing_secret
from db.merge.change import Organization, UserChange, merge_organizations
from db.merge.incoming import ReceivedChange
from tests.support.commands import RunCommand, runner
from tests.support.recorder import Recorder
from tests.support.settings import SECRET, MakeSettings
from tests.support.stack import Stack
from tests.support.storable import assert_storable, assert_storable_organization
from tests.support.waiting import wait_until
from web.signature import svix_webhook
from worker.clerk.payloads import ALL_TYPES, HANDLED_TYPES, ORGANIZATION_TYPES, FieldSources
from worker.runner.batch import incoming

NOW = 1_767_261_600_000
OTHER_SECRET = "whsec_plJ3nmyCDGBKInavdOK15jsl"


@pytest.fixture
def receiver() -> Iterator[Recorder]:
    with Recorder().running() as server:
        yield server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Run `clerk-sync send` and return its exit status, its output and its errors."""
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", f"{SECRET},{OTHER_SECRET}")
    return runner("send")


def sampled(type_: str, clerk_id: str) -> ReceivedChange:
    """Return what a sample that is sent at NOW says."""
    body = samples.encode(samples.sample(type_, clerk_id, NOW)).decode()
    return incoming("msg_1", body, NOW, FieldSources())


def test_every_type_is_delivered_and_applied(
    make_settings: MakeSettings,
    connection: psycopg.Connection,
    tmp_path: Path,
    run: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(port=free_port(), web_workers=1, organization_source="membership")
    monkeypatch.setenv("PORT", str(settings.port))
    clerk_id = samples.new_id("user")
    with Stack(settings, tmp_path) as stack:

        def row() -> Any:
            found = connection.execute(
                "SELECT role, last_login_at FROM users WHERE clerk_id = %s", [clerk_id]
            )
            return found.fetchone()

        def organization() -> Any:
            found = connection.execute("SELECT organization FROM users WHERE clerk_id = %s", [clerk_id])
            return found.fetchone()

        def applied() -> Any:
            return connection.execute("SELECT count(*) FROM webhook_events").fetchone()

        def send(type_: str, count: int) -> None:
            assert run(type_, "--user-id", clerk_id)[0] == 0
            wait_until(lambda: applied() == (count,), 20, stack.logs)

        send("user.created", 1)
        assert row() == ("user", None)
        send("user.updated", 2)
        assert row() == ("admin", None)
        for count, type_ in enumerate((t for t in HANDLED_TYPES if t.startswith("session.")), start=3):
            send(type_, count)
        role, last_login_at = row()
        assert role == "admin", "a session's user is as old as the sign-up"
        assert last_login_at is not None
        assert organization() == (None,)
        send("organizationMembership.created", count + 1)
        (founded,) = organization()
        assert founded.endswith(" Ltd")
        send("organizationMembership.updated", count + 2)
        assert organization() == (founded,)
        send("organization.updated", count + 3)
        assert organization() == (founded.replace("Ltd", "Group"),)
        send("organizationMembership.deleted", count + 4)
        assert organization() == (None,)
        send("organization.deleted", count + 5)
        send("user.deleted", count + 6)
        assert row() is None
        assert run("user.created", "--svix-id", "msg_1")[0] == 0
        assert run("user.created", "--svix-id", "msg_1")[1].startswith("200 duplicate: user.created of user_")
        forged = run("user.created", "--svix-id", "not:allowed")
        assert forged[0] == 1
        assert forged[1].startswith("400 the signature is missing or not valid: ")


def test_there_is_a_sample_of_every_type_that_is_handled() -> None:
    assert list(ALL_TYPES) == [*HANDLED_TYPES, *ORGANIZATION_TYPES]


@pytest.mark.parametrize("type_", HANDLED_TYPES)
def test_a_sample_is_understood_and_about_the_user_that_was_named(type_: str) -> None:
    understood = sampled(type_, "user_1")
    change = understood.change
    assert isinstance(change, UserChange)
    assert understood.type == type_
    assert understood.event_at == NOW
    assert change.clerk_id == "user_1"
    assert_storable(change)
    if change.email:
        assert str(change.email.address).endswith("@example.com")


@pytest.mark.parametrize("type_", ORGANIZATION_TYPES)
@pytest.mark.parametrize("clerk_id", ["user_1", "1", "user_36F9wJ2xNcVb6sQeLhG0pTrKyZa"])
def test_a_sample_of_organizations_is_understood_and_fits_the_others(type_: str, clerk_id: str) -> None:
    understood = sampled(type_, clerk_id)
    change = understood.change
    joined = sampled("organizationMembership.created", clerk_id).change
    assert isinstance(joined, UserChange)
    (membership,) = joined.memberships
    assert (understood.type, understood.event_at) == (type_, NOW)
    assert membership.ended_at is None
    if isinstance(change, UserChange):
        assert_storable(change)
        assert change.clerk_id == clerk_id
        ended_at = NOW if type_ == "organizationMembership.deleted" else None
        (shown,) = change.memberships
        assert shown[:3] == membership[:3]
        assert shown.ended_at == ended_at
    else:
        assert_storable_organization(change)
        assert change.id == membership.organization_id
        assert (change.deleted_at == NOW) == (type_ == "organization.deleted")


def test_a_sample_of_a_rename_is_newer_than_the_name_that_members_tell() -> None:
    joined, renamed = (sampled(type_, "user_1").change for type_ in ORGANIZATION_TYPES[1:4:2])
    assert isinstance(joined, UserChange)
    assert isinstance(renamed, Organization)
    (named,) = joined.organizations
    assert merge_organizations(named, renamed).name == renamed.name != named.name


def test_samples_about_one_user_fit_together() -> None:
    clerk_id = samples.new_id("user")
    said = [sampled(type_, clerk_id).change for type_ in HANDLED_TYPES]
    changes = [change for change in said if isinstance(change, UserChange)]
    profiles = [change.profile for change in changes if change.profile]
    claims = [change.email for change in changes if change.email]
    assert len(profiles) == len(claims) == len(HANDLED_TYPES) - 1
    assert {(profile.name, profile.created_at) for profile in profiles} == {
        (profiles[0].name, samples.SIGNED_UP)
    }
    assert len({claim.address for claim in claims}) == 1


def test_the_delivery_is_signed_as_svix_signs(run: RunCommand, receiver: Recorder) -> None:
    assert run("user.created", "--url", f"{receiver.url}/webhooks/clerk", "--svix-id", "msg_1")[0] == 0
    path, headers, body, *_ = receiver.requests[0]
    assert path == "/webhooks/clerk"
    assert headers["svix-id"] == "msg_1"
    assert headers["content-type"] == "application/json"
    svix_webhook()(SECRET).verify(body, headers)
    with pytest.raises(Exception, match="No matching signature found"):
        svix_webhook()(OTHER_SECRET).verify(body, headers)


@pytest.mark.parametrize("content", [b'{ "b" : 1,\r\n\t"a": "\xc3\xa9" }\n', b"\xff\x00 no JSON", b""])
def test_a_file_is_sent_as_it_is(run: RunCommand, receiver: Recorder, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "payload.json"
    file.write_bytes(content)
    assert run("--url", receiver.url, "--file", str(file))[0] == 0
    assert run("organization.created", "--url", receiver.url, "--file", str(file))[0] == 0
    key = decode_signing_secret(SECRET)
    for request in receiver.requests:
        assert request.body == content
        id_, sent = request.headers["svix-id"], int(request.headers["svix-timestamp"])
        assert samples.signed_headers(key, id_, sent, content).items() <= request.headers.items()


def test_without_a_user_id_each_sample_is_about_a_new_user(run: RunCommand, receiver: Recorder) -> None:
    for _ in range(2):
        run("session.created", "--url", receiver.url)
    sessions = [json.loads(request.body)["data"] for request in receiver.requests]
    assert len({session["user_id"] for session in sessions}) == 2
    assert len({session["user"]["email_addresses"][0]["email_address"] for session in sessions}) == 2
    assert len({request.headers["svix-id"] for request in receiver.requests}) == 2


def test_a_sample_comes_from_the_instance_that_is_expected(
    run: RunCommand, receiver: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLERK_INSTANCE_ID", "ins_mine")
    run("user.created", "--url", receiver.url)
    assert json.loads(receiver.requests[0].body)["instance_id"] == "ins_mine"


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [
        ((200, b'{"status":"duplicate"}'), 0, "200 duplicate: "),
        ((400, b'{"error":"the body\\nis not JSON"}'), 1, "400 the body is not JSON: "),
        ((503, b'{"error":"not now"}'), 1, "503 not now: "),
        ((502, b"<html>"), 1, "502 Bad Gateway: "),
        ((302, b"[]"), 1, "302 Found: "),
        ((200, b'{"status":[1]}'), 0, "200 OK: "),
    ],
)
def test_the_answer_is_one_line_and_the_exit_status(
    run: RunCommand, receiver: Recorder, answer: tuple[int, bytes], status: int, word: str
) -> None:
    receiver.answer = answer
    code, output, errors = run("user.created", "--url", receiver.url)
    assert (code, output.count("\n"), errors) == (status, 1, "")
    assert output.startswith(word)


def test_a_receiver_that_is_not_there_is_one_line_without_a_password(run: RunCommand) -> None:
    port = free_port()
    assert run("user.created", "--url", f"http://me:hidden@127.0.0.1:{port}/x?key=hidden") == (
        1,
        "",
        f"clerk-sync: nothing answers at http://127.0.0.1:{port}: start clerk-sync dev or clerk-sync web\n",
    )


def test_no_proxy_is_used(run: RunCommand, receiver: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert run("user.created", "--url", receiver.url)[0] == 0


@pytest.mark.parametrize("arguments", [(), ("user.invited",), ("organization.created",)])
def test_a_type_that_is_not_known_is_wrong_usage_and_names_those_that_are(
    run: RunCommand, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLERK_WEBHOOK_SIGNING_SECRET")
    code, _, errors = run(*arguments)
    assert code == 2
    assert all(type_ in errors for type_ in (*HANDLED_TYPES, *ORGANIZATION_TYPES))


@pytest.mark.parametrize(
    "arguments",
    [
        ("user.created", "--url", "ftp://127.0.0.1"),
        ("user.created", "--url", "127.0.0.1:8000"),
        ("user.created", "--url", "http://"),
        ("user.created", "--url", "http://[::1"),
        ("user.created", "--svix-id", "msg_\n"),
        ("user.created", "--svix-id", "msg_é"),
        ("--file", "/nowhere/payload.json"),
        ("--file", "/dev/null", "--user-id", "user_1"),
    ],
)
def test_what_cannot_be_sent_is_wrong_usage(run: RunCommand, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_a_missing_secret_is_named(run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLERK_WEBHOOK_SIGNING_SECRET")
    assert run("user.created") == (1, "", "clerk-sync: CLERK_WEBHOOK_SIGNING_SECRET is not set\n")


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "::1"), ("::", "::1"), ("127.0.0.2", "127.0.0.2"), ("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1")],
)
def test_without_a_url_it_goes_where_host_and_port_say(
    run: RunCommand, monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    with Recorder(address).running() as server:
        monkeypatch.setenv("HOST", host)
        monkeypatch.setenv("PORT", str(server.server_port))
        assert run("user.created")[0] == 0
    assert [request.path for request in server.requests] == ["/webhooks/clerk"]
