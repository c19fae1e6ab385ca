"""Deliveries to the receiver, signed as Svix signs them."""

import time
from collections.abc import Callable

from flask.testing import FlaskClient

from cli.samples import signed_headers
from config import decode_signing_secret
from tests.support.payloads import body, svix_id, user_event
from tests.support.settings import SECRET

PATH = "/webhooks/clerk"
MakeClient = Callable[..., FlaskClient]
FORGERY = {"error": "the signature is missing or not valid"}


def signed(
    content: bytes | None = None, *, id_: str | None = None, secret: str = SECRET, age_s: int = 0
) -> dict[str, str]:
    """Return the headers of an attempt, made `age_s` ago, to deliver `content` (default: `genuine()`)."""
    content = genuine() if content is None else content
    return signed_headers(decode_signing_secret(secret), id_ or svix_id(), int(time.time()) - age_s, content)


def genuine() -> bytes:
    """Return the body of a user.created."""
    return body(user_event())
