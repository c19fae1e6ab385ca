"""What is believed to come from Clerk, and that no header does anything but verify or be refused."""

import base64
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from unittest.mock import patch

import pytest
import standardwebhooks.webhooks
from hypothesis import given
from hypothesis import strategies as st

from tests.support.settings import SECRET
from web.signature import TOLERANCE_S, Forged, Verifier, read_headers, svix_webhook
from worker.monitoring.metrics import SignatureReason

WEBHOOK = (
    svix_webhook()
)  # whose package would take a second to import in every process that collects the tests
OTHER_SECRET = "whsec_YW5vdGhlciBrZXkgb2YgdHdlbnR5LWZvdXI="
ID, SENT, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
VALID = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
SVIX = ("HTTP_SVIX_ID", "HTTP_SVIX_TIMESTAMP", "HTTP_SVIX_SIGNATURE")
STANDARD = ("HTTP_WEBHOOK_ID", "HTTP_WEBHOOK_TIMESTAMP", "HTTP_WEBHOOK_SIGNATURE")

KEYS = st.binary(min_size=16, max_size=64)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,255}", fullmatch=True)
BODIES = st.text(st.characters(exclude_categories=["Cs"]))


def sign(secret: str, id_: str, at: datetime, text: str) -> str:
    """Return the signature that Svix's own library makes, `v1,<base64>`."""
    return WEBHOOK(secret).sign(id_, at, text)


def headers(
    id_: str = ID, timestamp: str = str(SENT), signature: str = VALID, names: tuple[str, ...] = SVIX
) -> dict[str, str]:
    return dict(zip(names, (id_, timestamp, signature), strict=True))


@contextmanager
def svix_clock(now_s: float) -> Iterator[None]:
    """Let the library believe that it is then: published examples are years old."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls.fromtimestamp(now_s, tz)

    with patch.object(standardwebhooks.webhooks, "datetime", Clock):
        yield


def verify(
    body: bytes, environ: dict[str, str], secrets: list[str], now_s: float, *, own_clock: bool = False
) -> str:
    """Return the svix-id of a genuine delivery. Raises Forged."""
    signed = read_headers(environ, now_s)
    if own_clock:
        Verifier(secrets).verify(signed, body)
    else:
        with svix_clock(now_s):
            assert Verifier(secrets).verify(signed, body) == body.decode()
    return signed["svix-id"]


def reason(environ: dict[str, str], *, now_s: float = SENT, body: bytes = BODY) -> SignatureReason:
    with pytest.raises(Forged) as forged:
        verify(body, environ, [SECRET], now_s)
    return SignatureReason(str(forged.value))


@pytest.mark.parametrize("names", [SVIX, STANDARD, (SVIX[0], STANDARD[1], SVIX[2])])
@pytest.mark.parametrize(
    ("secret", "id_", "sent", "body", "signature"),
    [
        (
            "whsec_plJ3nmyCDGBKInavdOK15jsl",
            "msg_loFOjxBNrRLzqYUf",
            1731705121,
            b'{"event_type":"ping","data":{"success":true}}',
            "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=",
        ),
        (SECRET, ID, SENT, BODY, VALID),
    ],
    ids=["Standard Webhooks", "Svix"],
)
def test_published_examples_are_genuine_under_both_header_names(  # noqa: PLR0917
    secret: str, id_: str, sent: int, body: bytes, signature: str, names: tuple[str, ...]
) -> None:
    assert verify(body, headers(id_, str(sent), signature, names), [secret], sent) == id_


def test_svix_names_go_before_those_of_standard_webhooks() -> None:
    forged = headers("msg_other", "1", "v1," + "A" * 43 + "=", STANDARD)
    assert verify(BODY, {**forged, **headers()}, [SECRET], SENT) == ID
    assert reason({**headers(names=STANDARD), **headers("msg_other")}) is SignatureReason.MISMATCH


@given(key=KEYS, id_=IDS, body=BODIES, age_s=st.integers(-290, 290))
def test_what_svix_signs_is_genuine(key: bytes, id_: str, body: str, age_s: int) -> None:
    sent = datetime.fromtimestamp(int(time.time()) - age_s, UTC)
    secret = "whsec_" + base64.b64encode(key).decode()
    signed = headers(id_, str(int(sent.timestamp())), sign(secret, id_, sent, body))
    assert verify(body.encode(), signed, [OTHER_SECRET, secret], time.time(), own_clock=True) == id_


@given(
    field=st.sampled_from([*SVIX, "body"]),
    position=st.integers(min_value=0),
    character=st.sampled_from("0Aa_-+/=,.9"),
)
def test_one_changed_character_is_a_forgery(field: str, position: int, character: str) -> None:
    sent = datetime.now(UTC)
    parts = headers(timestamp=str(int(sent.timestamp())), signature=sign(SECRET, ID, sent, "{}"))
    parts["body"] = "{}"
    original = parts[field]
    position %= len(original)
    parts[field] = original[:position] + character + original[position + 1 :]
    if parts[field] == original or _means_the_same(parts[field], original):
        return
    body = parts.pop("body")
    with pytest.raises(Forged):
        verify(body.encode(), parts, [SECRET], time.time(), own_clock=True)


def _means_the_same(one: str, other: str) -> bool:
    """Whether two signatures differ only in bits that base64 leaves over."""
    try:
        return one[:3] == other[:3] == "v1," and base64.b64decode(one[3:]) == base64.b64decode(other[3:])
    except ValueError:
        return False


@given(
    id_=st.one_of(st.just(ID), st.text()),
    timestamp=st.one_of(st.just(str(SENT)), st.text(), st.integers().map(str)),
    entries=st.lists(st.one_of(st.just(VALID), st.text(), st.just("v1,"), st.text().map("v1,{}".format))),
    separator=st.sampled_from([" ", "  ", "\t", ",", ""]),
    body=st.one_of(st.just(BODY), st.binary()),
)
def test_no_header_text_does_anything_but_prove_or_fail(
    id_: str, timestamp: str, entries: list[str], separator: str, body: bytes
) -> None:
    try:
        proven = verify(body, headers(id_, timestamp, separator.join(entries)), [SECRET], SENT)
    except Forged:
        return
    assert (proven, id_, int(timestamp), body) == (ID, ID, SENT, BODY)
    assert VALID in separator.join(entries)


@given(st.dictionaries(st.one_of(st.sampled_from([*SVIX, *STANDARD]), st.text()), st.text()))
def test_no_set_of_headers_does_anything_but_fail(given: dict[str, str]) -> None:
    assert reason(given) in set(SignatureReason)


@pytest.mark.parametrize("missing", SVIX)
def test_a_missing_or_empty_header_is_named_so(missing: str) -> None:
    assert (
        reason({name: value for name, value in headers().items() if name != missing})
        is SignatureReason.MISSING
    )
    assert reason({**headers(), missing: ""}) is SignatureReason.MISSING


@pytest.mark.parametrize(
    "signature",
    [
        "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        "v1",
        "v1,",
        ",",
        ", ,",
        " ",
        "v1 ,g0hM",
        "v1a,MCowBQYDK2VwAyEA",
        "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        "V1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        "v1:g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        "v1,AAAA",
        "v1,not base64 at all!",
        "v1,=",
        "v1,ü",
        "v1,\udcff",
        "v1,g0hM,9SsE",
        VALID + ",",
        VALID + "=",
        VALID + VALID,
        f",{VALID}",
        VALID.replace("v1,", "v1,,"),
        VALID.replace("v1,", "v1a,") + " v1,AAAA",
        "\u028b1,ü",
        "\x00",
    ],
)
def test_a_signature_header_without_a_well_formed_entry_is_malformed(signature: str) -> None:
    assert reason(headers(signature=signature)) is SignatureReason.MALFORMED


def test_an_entry_that_does_not_match_is_a_mismatch() -> None:
    assert reason(headers(signature="v1," + "A" * 43 + "=")) is SignatureReason.MISMATCH
    assert reason(headers(signature=VALID.lower())) is SignatureReason.MISMATCH


@pytest.mark.parametrize(
    "other",
    ["v1,AAAA", "v1", "v1,a,b", "v1,ü", "v1,!", "v1a,MCow", ",", "\x00", " ", "v1,", "v1," + "A" * 43 + "="],
)
def test_a_valid_entry_counts_beside_any_other(other: str) -> None:
    for signature in (f"{other} {VALID}", f"{VALID} {other}", f"{other}  {VALID} ", f" {VALID}\t{other}"):
        assert verify(BODY, headers(signature=signature), [SECRET], SENT) == ID


@pytest.mark.parametrize("body", [b"\xff", "{}".encode("utf-16")])
def test_a_body_that_is_no_text_is_refused(body: bytes) -> None:
    assert reason(headers(), body=body) is SignatureReason.MALFORMED


def test_any_of_several_secrets_may_have_signed() -> None:
    assert verify(BODY, headers(), [OTHER_SECRET, SECRET], SENT) == ID
    assert verify(BODY, headers(), [SECRET, OTHER_SECRET], SENT) == ID
    with pytest.raises(Forged):
        verify(BODY, headers(), [OTHER_SECRET], SENT)
    with pytest.raises(Forged):
        verify(BODY, headers(), [], SENT)


@pytest.mark.parametrize("drift_s", [-TOLERANCE_S, -1, 0, 0.9, TOLERANCE_S])
def test_five_minutes_either_way_are_tolerated(drift_s: float) -> None:
    assert verify(BODY, headers(), [SECRET], SENT + drift_s) == ID


@pytest.mark.parametrize("drift_s", [-TOLERANCE_S - 0.001, TOLERANCE_S + 0.001, 86_400, -86_400])
def test_more_than_five_minutes_either_way_are_stale(drift_s: float) -> None:
    assert reason(headers(), now_s=SENT + drift_s) is SignatureReason.STALE


@pytest.mark.parametrize(
    "timestamp",
    [
        "now",
        "-1",
        f"+{SENT}",
        f" {SENT}",
        f"{SENT}\n",
        f"{SENT}.0",
        "1.6e9",
        "0x60",
        "1_614_265_330",
        "".join(chr(0xFF10 + int(digit)) for digit in str(SENT)),  # digits of full width
        "\u0663",
        "nan",
        "inf",
        "9" * 5000,
        "\x00",
    ],
)
def test_a_timestamp_is_nothing_but_digits(timestamp: str) -> None:
    assert reason(headers(timestamp=timestamp)) is SignatureReason.MALFORMED


@pytest.mark.parametrize(
    "id_", ["msg id", "msg.id", "msg:id", "msg/id", "msg\n", " msg", "mésg", "\x00", "m" * 256, "{}", "%00"]
)
def test_an_id_that_cannot_name_a_job_is_refused_even_when_signed(id_: str) -> None:
    signature = sign(SECRET, id_, datetime.fromtimestamp(SENT, UTC), BODY.decode())
    assert reason(headers(id_=id_, signature=signature)) is SignatureReason.MALFORMED


def test_the_longest_id_is_taken() -> None:
    id_ = "m" * 255
    signature = sign(SECRET, id_, datetime.fromtimestamp(SENT, UTC), BODY.decode())
    assert verify(BODY, headers(id_=id_, signature=signature), [SECRET], SENT) == id_


def test_the_error_says_no_more_than_the_reason() -> None:
    with pytest.raises(Forged, match=r"^mismatch$"):
        verify(b"", headers(), [SECRET], SENT)


def test_the_library_verifies_without_its_client_of_svixs_api() -> None:
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, web.app; from web.signature import svix_webhook; svix_webhook();"
            " print([name for name in sys.modules if name.split('.')[0] in ('svix', 'httpx')])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "[]\n"
    package = importlib.import_module("svix.webhooks")
    assert WEBHOOK.verify.__code__ == package.Webhook.verify.__code__, "the one of the package"
