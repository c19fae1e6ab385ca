"""What can be read of a body, and what becomes of one that cannot."""

import json
import re
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.merge.change import Organization, UserChange
from tests.support.hypothesis_settings import no_deadline
from tests.support.payloads import (
    ABSENT,
    ANN,
    NOW,
    PAYLOADS,
    Json,
    body,
    deleted_event,
    payload,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.storable import assert_storable, assert_storable_organization, assert_text
from worker.clerk.changes import change_of, storable_text
from worker.clerk.decoding import decode
from worker.clerk.errors import EventError, NotJson, Unreadable
from worker.clerk.payloads import (
    ALL_TYPES,
    HANDLED_TYPES,
    FieldSources,
    SessionChanged,
    UserDeleted,
    UserUpserted,
    parse,
    summarize,
)

KEYS = FieldSources()
WITH_MEMBERSHIPS = FieldSources(organization=None, memberships=True)
MARK = "q7Zx"  # stands for whatever is personal: no reason may hold it
MARKED = {"first_name": MARK, "last_name": MARK, "username": MARK, "email": f"{MARK}@example.com"}
DIGITS = "9" * 6000
DEEP = 50_000


def as_text(event: object) -> str:
    return body(event).decode()


HANDLED = {
    "user.created": (user_event("user.created"), UserUpserted),
    "user.updated": (user_event("user.updated"), UserUpserted),
    "user.deleted": (deleted_event(), UserDeleted),
    "session.created": (session_event("session.created"), SessionChanged),
    "session.pending": (session_event("session.pending"), SessionChanged),
    "session.ended": (session_event("session.ended"), SessionChanged),
    "session.removed": (session_event("session.removed"), SessionChanged),
    "session.revoked": (session_event("session.revoked"), SessionChanged),
}


def test_the_handled_types_are_these_eight() -> None:
    assert sorted(HANDLED_TYPES) == sorted(HANDLED)


@pytest.mark.parametrize(("event", "kind"), HANDLED.values(), ids=HANDLED.keys())
def test_a_handled_type_is_its_fact(event: Json, kind: type) -> None:
    assert isinstance(parse(as_text(event), KEYS).fact, kind)


def test_key_order_and_white_space_say_nothing() -> None:
    event = user_event(data=user(last_sign_in_at=NOW))
    other = json.dumps(dict(reversed(event.items())), indent=3, sort_keys=True)
    assert parse(other, KEYS) == parse(as_text(event), KEYS)


BAD_IDS: dict[str, object] = {
    "missing": ABSENT,
    "null": None,
    "empty": "",
    "a number": 5,
    "a list": [ANN],
    "an object": {"id": ANN},
    "true": True,
    "201 characters": MARK + "a" * 197,
    "a dot": f"user.{MARK}",
    "a space": f"user {MARK}",
    "an e-mail address": f"{MARK}@example.com",
    "a newline at its end": f"{MARK}\n",
    "NUL": f"{MARK}\0",
    "a letter that is not ASCII": f"{MARK}é",
    "a digit that is not ASCII": f"{MARK}\u0661",
    "a lone surrogate": f"{MARK}\ud800",
}

UNREADABLE: dict[str, str] = {
    "no JSON": f"{{{MARK}",
    "nothing": "",
    "a byte order mark": "\ufeff" + as_text(user_event()),
    "two values": as_text(user_event()) * 2,
    "NaN": as_text(user_event()).replace(str(NOW), "NaN"),
    "Infinity": as_text(user_event()).replace(str(NOW), "Infinity"),
    "a raw control character": as_text(user_event(data=user(first_name=MARK))).replace(MARK, MARK + "\n"),
    "broken after a number of 6,000 digits": f'{{"data":{DIGITS},"{MARK}"}}',
    "NaN after a number of 6,000 digits": f"[{DIGITS},NaN]",
    "deep arrays": "[" * DEEP + "]" * DEEP,
    "deep arrays without an end": "[" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "an array": as_text([user_event(data=user(**MARKED))]),
    "a text": as_text(MARK),
    "a number": "5",
    "a number of 6,000 digits": DIGITS,
    "null": "null",
    "no type": as_text(user_event(data=user(**MARKED), type=ABSENT)),
    "type null": as_text(user_event(data=user(**MARKED), type=None)),
    "type a number": as_text(user_event(data=user(**MARKED), type=5)),
    "type an array": as_text(user_event(data=user(**MARKED), type=["user.created", MARK])),
    "type an object": as_text(user_event(data=user(**MARKED), type={"type": MARK})),
    "a type that is not handled": as_text(user_event(f"email.{MARK}", user(**MARKED))),
    "a type in capitals": as_text(user_event("User.Created", user(**MARKED))),
    "data missing": as_text(user_event(data=ABSENT)),
    "data null": as_text({**user_event(), "data": None}),
    "data a text": as_text(user_event(data=MARK)),
    "data an array": as_text(user_event(data=[user(**MARKED)])),
    "session data null": as_text({**session_event(), "data": None}),
    "deleted data null": as_text({**deleted_event(), "data": None}),
    **{f"user id {name}": as_text(user_event(data=user(value, **MARKED))) for name, value in BAD_IDS.items()},
    **{f"deleted id {name}": as_text(deleted_event(value)) for name, value in BAD_IDS.items()},
    **{
        f"session's user id {name}": as_text(session_event(data=session(value, user=user(**MARKED))))
        for name, value in BAD_IDS.items()
    },
    "a session without user_id that carries its user": as_text(
        session_event(data=session(ABSENT, user=user(**MARKED)))
    ),
    "a session with an id that is its user's too, but no Clerk id": as_text(
        session_event(data=session(f"{MARK}.", user=user(f"{MARK}.")))
    ),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_understood_is_unreadable_for_a_clean_reason(text: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse(text, KEYS)
    assert_clean(caught.value)


def test_an_unreadable_event_is_not_retried() -> None:
    assert not Unreadable.retryable
    assert not NotJson.retryable


NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{'a': 1}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "NaN": b'{"a": NaN}',
    "minus Infinity": b'{"a": -Infinity}',
    "a comma too many": b'{"a": 1,}',
    "two values": b"{}{}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a raw control character": b'{"a": "\x00"}',
    "deep arrays without an end": b"[" * DEEP,
    "deep objects without an end": b'{"a":' * DEEP + b"1",
    "broken after a number of 6,000 digits": f'{{"a": {DIGITS},}}'.encode(),
    "NaN after a number of 6,000 digits": f'{{"a": {DIGITS}, "b": NaN}}'.encode(),
    "a string that is never closed": b'["' + b'\\"' * 500_000,
    "deep after a number of 6,000 digits": f"[{DIGITS},".encode() + b"[" * DEEP,
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_body_that_is_not_json_is_answered_at_once(raw: bytes) -> None:
    with pytest.raises(NotJson) as caught:
        decode(raw)
    assert_clean(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(DIGITS.encode(), id="a number of 6,000 digits"),
        pytest.param(f"-{DIGITS}".encode(), id="a negative one"),
        pytest.param(f"0.{DIGITS}".encode(), id="6,000 decimals"),
        pytest.param(b"1e999999", id="a number beyond every float"),
        pytest.param(b'"\\ud800"', id="a lone surrogate"),
        pytest.param(b'"\\u0000"', id="NUL"),
        pytest.param(b"[" * 100 + b"]" * 100, id="100 arrays deep"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, id="deep arrays"),
        pytest.param(b'{"a":' + b"[" * 1100 + DIGITS.encode() + b"]" * 1100 + b"}", id="deep digits"),
        pytest.param(b'{"a":' * DEEP + b"1" + b"}" * DEEP, id="deep objects"),
        pytest.param(b'{"a": 1, "a": 2}', id="a key twice"),
    ],
)
def test_odd_json_is_json_all_the_same(raw: bytes) -> None:
    decode(raw)


def test_fields_nested_to_any_depth_are_understood_or_unreadable() -> None:
    for depth in (45, 46, 47, 48, 49, 50, 51, 52, *range(900, 1100, 7), 4000):
        nested = "[" * depth + "]" * depth
        entry = f'{{"id":{nested},"email_address":{nested}}}'
        data = f'{{"id":"{ANN}","email_addresses":[{entry}],"primary_email_address_id":{nested}}}'
        assert_understood_or_unreadable(f'{{"type":"user.created","data":{data},"timestamp":{nested}}}')


@pytest.mark.parametrize(
    "event", [user_event(), session_event(data=session(user=user()))], ids=["user", "session"]
)
def test_metadata_that_is_not_read_decides_nothing(event: Json) -> None:
    meant = parse(as_text(event), KEYS)
    shown = event["data"].get("user") or event["data"]
    shown["unsafe_metadata"] = "HERE"
    for metadata in awkward_metadata():
        assert parse(as_text(event).replace('"HERE"', metadata), KEYS) == meant


def awkward_metadata() -> Iterator[str]:
    """Yield JSON of up to 8 kB that a browser can write, of kinds that decoders refuse."""
    for depth in range(50, 4001, 79):
        yield "[" * depth + "]" * depth
        yield '{"":' * min(depth, 1600) + '"]}[{\\"}"' + "}" * min(depth, 1600)
    for digits in (19, 20, 309, 400, 401, 4300, 4301, 8000):
        yield "9" * digits
        yield f"-{'9' * digits}.5e{digits}"
    yield '{"id":"user_other","role":"admin","\\ud800":"\\u0000","a":1,"a":2}'
    yield f"[{'[],' * 2700}{'[' * 40}{'9' * 500}{']' * 40}]"


@pytest.mark.parametrize("name", sorted(path.stem for path in PAYLOADS.glob("*.json")))
def test_a_summary_names_type_user_and_instance(name: str) -> None:
    event = payload(name)
    about = event["data"].get("user_id", event["data"]["id"])
    assert summarize(event, HANDLED_TYPES) == (event["type"], False, about, event.get("instance_id"))


@pytest.mark.parametrize(
    ("envelope", "type_", "handled"),
    [
        (user_event("user.banned"), "user.banned", False),
        (user_event("email.created", {"id": MARK, "body": MARK}), "email.created", False),
        (user_event(type=None), None, None),
        (user_event(type=["user.created"]), None, None),
        (user_event(type=ABSENT), None, None),
        ([user_event()], None, None),
        ("user.created", None, None),
        (None, None, None),
        (5, None, None),
    ],
    ids=["unhandled", "one-time code", "null", "array", "absent", "no object", "text", "nothing", "number"],
)
def test_a_summary_says_whether_the_type_is_handled(
    envelope: object, type_: str | None, handled: bool | None
) -> None:
    summary = summarize(envelope, HANDLED_TYPES)
    assert (summary.type, summary.is_ignored) == (type_, handled is False)


@pytest.mark.parametrize("value", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_a_summary_never_holds_what_is_no_clerk_id(value: object) -> None:
    for event in (user_event(data=user(value)), deleted_event(value), session_event(data=session(value))):
        assert summarize(event, HANDLED_TYPES).clerk_id is None
        assert not summarize(event, HANDLED_TYPES).is_ignored


odd_text = st.text(
    st.sampled_from(["\0", "\ud800", "\udfff", "\ufffd", "@", ".", "a", "é", "😀", " ", "\n", "'", '"']),
    max_size=8,
)
odd_number = (
    st.integers()
    | st.sampled_from(
        [0, -1, 1, 10**11 - 1, 10**11, NOW, 253_402_300_799_999, 253_402_300_800_000, 10**30, 1e300]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
)
scalar = (
    st.none()
    | st.booleans()
    | odd_number
    | odd_text
    | st.text()
    | st.sampled_from(["n" * 3000, ANN, f"{ANN}@example.com", f"{MARK}\0@"])
)
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text | st.text(), inner, max_size=4),
)
genuine = st.sampled_from(sorted(PAYLOADS.rglob("*.json"))).map(lambda path: json.loads(path.read_text()))
damage = st.text(max_size=5) | st.sampled_from(
    ["\\ud800", "\\u0000", DIGITS, f"{DIGITS},", "[" * DEEP, "NaN"]
)


def assert_clean(error: EventError) -> None:
    """Fail when the reason, or what a log would print of the error, holds what the event holds."""
    assert str(error)
    assert MARK not in "".join(traceback.format_exception(error))
    assert MARK not in repr(error)
    assert re.fullmatch(r"[\w ',.-]{1,100}", str(error))


def understood(text: str) -> UserChange | Organization | Unreadable:
    try:
        return change_of(parse(text, WITH_MEMBERSHIPS), NOW)
    except Unreadable as error:
        return error


def assert_understood_or_unreadable(text: str) -> None:
    """Fail unless `text` ends as a change that can be stored, or as Unreadable with a clean reason."""
    found = understood(text)
    match found:
        case Unreadable():
            assert_clean(found)
        case Organization():
            assert_storable_organization(found)
        case UserChange():
            assert_storable(found)


def mutate(event: Json, data: st.DataObject) -> None:
    """Change, spoil or remove one value anywhere in `event`."""
    filled = [holder for holder in holders(event) if holder]
    if not filled:
        return
    holder = data.draw(st.sampled_from(filled))
    key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    if data.draw(st.booleans()):
        holder[key] = data.draw(anything)
    else:
        del holder[key]


def holders(value: Any) -> Iterator[Any]:
    """Yield every object and array in `value`, itself included."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from holders(inner)


@no_deadline
@given(anything)
def test_any_json_is_understood_or_unreadable(value: object) -> None:
    assert_understood_or_unreadable(as_text(value))


@no_deadline
@given(anything, st.sampled_from(ALL_TYPES), anything)
def test_any_data_is_understood_or_unreadable(data: object, type_: str, timestamp: object) -> None:
    assert_understood_or_unreadable(as_text({"type": type_, "data": data, "timestamp": timestamp}))


@no_deadline
@given(genuine, st.data())
def test_any_mutation_of_a_genuine_event_is_understood_or_unreadable(
    event: Json, data: st.DataObject
) -> None:
    for _ in range(data.draw(st.integers(1, 5))):
        mutate(event, data)
    summarize(event, ALL_TYPES)
    assert_understood_or_unreadable(as_text(event))


@no_deadline
@given(genuine, st.data())
def test_any_damage_to_a_genuine_event_is_understood_or_unreadable(event: Json, data: st.DataObject) -> None:
    text = as_text(event)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    assert_understood_or_unreadable(text[:start] + data.draw(damage) + text[end:])


@no_deadline
@given(st.binary() | st.tuples(genuine.map(body), st.binary(max_size=3), st.binary(max_size=3)).map(b"".join))
def test_any_bytes_are_json_or_not_json(raw: bytes) -> None:
    try:
        decode(raw)
    except NotJson as error:
        assert_clean(error)


@no_deadline
@given(anything)
def test_any_json_can_be_summarized(value: object) -> None:
    assert not summarize(decode(body(value)), HANDLED_TYPES).is_ignored or isinstance(value, dict)


@no_deadline
@given(st.text(st.characters() | st.sampled_from("\0\ud800\udfff"), max_size=400))
def test_stored_text_can_be_stored_and_stays_what_it_is(text: str) -> None:
    stored = storable_text(text)
    assert_text(stored)
    assert storable_text(stored) == stored
    if not re.search("[\0\ud800-\udfff]", text):
        assert stored == text[:255]
