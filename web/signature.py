"""Checks that a delivery comes from Clerk: the shapes of its headers first, then the svix library.

Clerk sends through Svix, whose library verifies `<id>.<timestamp>.<body>` against HMAC-SHA256 signatures. The
library raises errors of four kinds for headers that are malformed, also when a valid signature stands beside
them. So only entries of the right shape are passed to it, and any error that it raises means forged.

Source: docs.svix.com, "Verifying webhooks"; github.com/standard-webhooks, whose header names some relays use.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from worker.monitoring.metrics import SignatureReason

if TYPE_CHECKING:
    from svix.webhooks import Webhook

# Names in WSGI's environ: Svix's own, and those of Standard Webhooks.
ID_HEADERS = ("HTTP_SVIX_ID", "HTTP_WEBHOOK_ID")
TIMESTAMP_HEADERS = ("HTTP_SVIX_TIMESTAMP", "HTTP_WEBHOOK_TIMESTAMP")
SIGNATURE_HEADERS = ("HTTP_SVIX_SIGNATURE", "HTTP_WEBHOOK_SIGNATURE")
TOLERANCE_S = 300  # the library's own, to the past and to the future
SVIX_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")  # It becomes a job id, and RQ takes no other characters.
TIMESTAMP = re.compile(r"[0-9]{1,12}")
SIGNATURE = re.compile(r"(?<!\S)v1,[A-Za-z0-9+/]{43}=(?!\S)")  # HMAC-SHA256 in base64, an entry of its own


class Forged(Exception):
    """The delivery is not proven to come from Clerk, or is too old. The text is a SignatureReason."""


def read_headers(environ: Mapping[str, Any], now_s: float) -> dict[str, str]:
    """Return the headers of a delivery that may be genuine, as the svix library wants them.

    These are all checks that need no body. `environ` is WSGI's, `now_s` the Unix time. Raises Forged when a
    header is missing, malformed or stale.
    """
    svix_id, timestamp, signature = (
        environ.get(name) or environ.get(other)
        for name, other in (ID_HEADERS, TIMESTAMP_HEADERS, SIGNATURE_HEADERS)
    )
    if not (svix_id and timestamp and signature):
        raise Forged(SignatureReason.MISSING)
    entries = SIGNATURE.findall(signature)
    if not (SVIX_ID.fullmatch(svix_id) and TIMESTAMP.fullmatch(timestamp) and entries):
        raise Forged(SignatureReason.MALFORMED)
    if abs(now_s - int(timestamp)) > TOLERANCE_S:
        raise Forged(SignatureReason.STALE)
    return {"svix-id": svix_id, "svix-timestamp": timestamp, "svix-signature": " ".join(entries)}


@cache
def svix_webhook() -> "type[Webhook]":
    """Load and return `svix.webhooks.Webhook`, without the rest of the package.

    `import svix` would also load a client of Svix's API, which takes 44 MB and is not needed (svix 2.9).
    """
    package = cast("Any", importlib.util.find_spec("svix"))
    spec = importlib.util.spec_from_file_location(
        "svix_webhooks", Path(package.origin).with_name("webhooks.py")
    )
    module = importlib.util.module_from_spec(cast("Any", spec))
    cast("Any", spec).loader.exec_module(module)
    return cast("type[Webhook]", module.Webhook)


class Verifier:
    """Verifies with the svix library; any of several secrets may have signed."""

    def __init__(self, secrets: Iterable[str]) -> None:
        webhook = svix_webhook()
        self._webhooks = [webhook(secret) for secret in secrets]

    def verify(self, headers: dict[str, str], body: bytes) -> str:
        """Return the body's text if a secret has signed it. Raises Forged."""
        try:
            text = body.decode()
        except UnicodeDecodeError:  # Svix signs text
            raise Forged(SignatureReason.MALFORMED) from None
        if not any(_is_signed(webhook, text, headers) for webhook in self._webhooks):
            raise Forged(SignatureReason.MISMATCH)
        return text


def _is_signed(webhook: "Webhook", text: str, headers: dict[str, str]) -> bool:
    try:
        webhook.verify(text, headers)
    except Exception:  # of any class: see the module's docstring
        return False
    return True
