"""How much of a body is read, and how much memory unfinished ones take."""

import io
from contextlib import ExitStack
from typing import Any

import pytest

from web.body import LARGE_BODIES_BYTES, ORDINARY_BYTES, BodyReader, Incomplete, NoRoom, TooLarge

MAX_BYTES = 1024 * 1024


def environ(content: bytes, length: int | None = None, *, chunked: bool = False) -> dict[str, Any]:
    declared = {} if chunked else {"CONTENT_LENGTH": str(len(content) if length is None else length)}
    return {"wsgi.input": io.BytesIO(content), "wsgi.input_terminated": True, **declared}


class Untouched:
    """A body that must not be read."""

    def read(self, _size: int) -> bytes:
        raise AssertionError("it was read")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "size", [0, 1, ORDINARY_BYTES - 1, ORDINARY_BYTES, ORDINARY_BYTES + 1, MAX_BYTES - 1, MAX_BYTES]
)
def test_a_body_up_to_the_maximum_is_given_whole(size: int, chunked: bool) -> None:
    with BodyReader(MAX_BYTES).body(environ(b"a" * size, chunked=chunked)) as body:
        assert body == b"a" * size


def test_a_larger_one_is_refused_by_its_length_alone_or_when_it_has_come_that_far() -> None:
    reader = BodyReader(MAX_BYTES)
    with (
        pytest.raises(TooLarge),
        reader.body({"wsgi.input": Untouched(), "CONTENT_LENGTH": str(MAX_BYTES + 1)}),
    ):
        pass
    with pytest.raises(TooLarge), reader.body(environ(b"a" * (MAX_BYTES + 1), chunked=True)):
        pass
    with reader.body(environ(b"a" * MAX_BYTES)) as body:
        assert len(body) == MAX_BYTES


@pytest.mark.parametrize("length", [10, ORDINARY_BYTES * 2])
def test_a_body_that_ends_early_is_incomplete(length: int) -> None:
    with pytest.raises(Incomplete), BodyReader(MAX_BYTES).body(environ(b"short", length)):
        pass


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_share_their_room_and_ordinary_ones_are_always_read(chunked: bool) -> None:
    reader = BodyReader(MAX_BYTES)
    large = b"a" * MAX_BYTES
    with ExitStack() as stack:
        for _ in range(LARGE_BODIES_BYTES // MAX_BYTES):
            stack.enter_context(reader.body(environ(large, chunked=chunked)))
        with pytest.raises(NoRoom):
            stack.enter_context(reader.body(environ(large, chunked=chunked)))
        for _ in range(1000):
            assert stack.enter_context(reader.body(environ(b"a" * ORDINARY_BYTES)))
    with reader.body(environ(large)) as body:
        assert body == large


def test_room_is_given_back_when_reading_or_using_a_body_fails() -> None:
    reader = BodyReader(MAX_BYTES)
    for _ in range(100):
        with pytest.raises(Incomplete), reader.body(environ(b"short", MAX_BYTES)):
            pass
        with pytest.raises(ZeroDivisionError), reader.body(environ(b"a" * MAX_BYTES)):
            raise ZeroDivisionError
    with reader.body(environ(b"a" * MAX_BYTES)):
        pass


def test_one_body_of_the_maximum_always_fits() -> None:
    size = 2 * LARGE_BODIES_BYTES
    with BodyReader(size).body(environ(b"a" * size)) as body:
        assert len(body) == size
