"""Fields of Clerk's user object as `user_profiles` keeps them, in one canonical form. Pure: no I/O."""

import math
import re
from typing import Any

import orjson

MAX_DEPTH = 32  # deeper values become null, at the same depth in a listing and in a delivery
LEAST, TOO_GREAT = -(2**63), 2**64  # whole numbers between them are exact in the JSON library
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def canonical(fields: dict[str, Any]) -> str:
    """Return `fields` as JSON that is the same for equal values, before PostgreSQL has stored them and after.

    Keys are sorted; numbers have one form, and become null beyond the range of a double.
    """
    return orjson.dumps(_cleaned(fields, MAX_DEPTH), option=orjson.OPT_SORT_KEYS).decode()


def clean_text(text: str) -> str:
    """Return `text` as PostgreSQL can store it: without NUL, with lone surrogates replaced by U+FFFD."""
    if text.isascii():
        return text.replace("\0", "")
    return LONE_SURROGATE.sub("\ufffd", text.replace("\0", ""))


def _cleaned(value: Any, depth: int) -> Any:
    match value:
        case str():
            return clean_text(value)
        case None | bool():
            return value
        case int() | float():
            return _number(value)
        case list() if depth:
            return [_cleaned(item, depth - 1) for item in value]
        case dict() if depth:
            return {clean_text(key): _cleaned(value[key], depth - 1) for key in sorted(value)}
    return None


def _number(value: float) -> int | float | None:
    if LEAST <= value < TOO_GREAT and value == int(value):
        return int(value)
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
