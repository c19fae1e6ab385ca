"""Whether a delivery is genuine: Svix's signatures, checked with the standard library.

Svix signs `<svix-id>.<svix-timestamp>.<body>` with HMAC-SHA256 and sends the base64 of it as `v1,<base64>`,
an entry for each key that is in use, with spaces between them. Importing the svix package for this would
cost every process half a second and 44 MB, and its check lets a malformed header escape as a ValueError; the
tests compare with it. Source: docs.svix.com, "Verifying webhooks manually".
"""

import hmac
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

HEADERS = ("svix-id", "svix-timestamp", "svix-signature")
TOLERANCE_S = 300  # Svix's own, to the past and to the future.
SVIX_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")  # It becomes a job id, and RQ takes no other characters.
TIMESTAMP = re.compile(r"[0-9]{1,12}")


class Reason(StrEnum):
    """Why a delivery is not believed: for the log and the counters, never for the sender."""

    MISSING = "missing"
    MALFORMED = "malformed"
    STALE = "stale"
    MISMATCH = "mismatch"


class Forged(Exception):
    """The delivery is not proven to come from Clerk, or is too old to be believed."""

    retryable = False

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def verify(body: bytes, headers: Mapping[str, str], keys: Sequence[bytes], now_s: float) -> str:
    """Return the svix-id of a genuine delivery.

    `headers` has the names of HEADERS in lower case, `keys` are the decoded signing secrets, any of which may
    have signed, `now_s` is the Unix time. Raises Forged.
    """
    svix_id, timestamp, signatures = _read(headers)
    if abs(now_s - int(timestamp)) > TOLERANCE_S:
        raise Forged(Reason.STALE)
    signed = b"%b.%b.%b" % (svix_id.encode(), timestamp.encode(), body)
    if not _any_match(signatures, [_sign(signed, key) for key in keys]):
        raise Forged(Reason.MISMATCH)
    return svix_id


def _read(headers: Mapping[str, str]) -> tuple[str, str, list[bytes]]:
    svix_id, timestamp, signature = (headers.get(name, "") for name in HEADERS)
    if not (svix_id and timestamp and signature):
        raise Forged(Reason.MISSING)
    signatures = _signatures(signature)
    if not (SVIX_ID.fullmatch(svix_id) and TIMESTAMP.fullmatch(timestamp) and signatures):
        raise Forged(Reason.MALFORMED)
    return svix_id, timestamp, signatures


def _signatures(header: str) -> list[bytes]:
    # Entries of other versions (v1a is a public-key signature) and of no known shape are passed over: a valid
    # one may stand beside them.
    entries = (entry.partition(",") for entry in header.split())
    return [given.encode(errors="replace") for version, _, given in entries if version == "v1" and given]


def _sign(signed: bytes, key: bytes) -> bytes:
    return b64encode(hmac.digest(key, signed, "sha256"))


def _any_match(signatures: Iterable[bytes], expected: Sequence[bytes]) -> bool:
    # The text is compared, not what it decodes to: so there is no base64 to be malformed.
    return any(hmac.compare_digest(given, wanted) for given in signatures for wanted in expected)
