"""What Linux alone can do is left out on other systems; the rest works."""

import threading

import pytest
from werkzeug.test import Client

from tests.support.settings import MakeSettings
from web import body_timeout
from web.app import create_app
from web.body_timeout import BodyTimeout
from web.connections import Limits


def test_a_system_that_cannot_look_at_connections_serves_and_closes_none(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_timeout, "SUPPORTED", False)
    app = BodyTimeout(create_app(make_settings()), 8000, Limits())
    app.watch()
    assert "connections" not in {thread.name for thread in threading.enumerate()}
    with Client(app).post(
        "/webhooks/clerk", data=b"{}", environ_overrides={"REMOTE_ADDR": "127.0.0.1"}
    ) as answer:
        assert answer.status_code == 400
