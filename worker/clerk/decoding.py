"""Decodes Clerk's JSON, for webhooks and for the API, whatever users have put into it.

Any user can write 8 kB of JSON into `unsafe_metadata` from the browser, nested deeper or with longer numbers
than a decoder accepts. That field is not used, so it must not make an event or a page unreadable.
"""

import json
import re
from typing import Any

import orjson

from worker.clerk.errors import NotJson

MAX_DEPTH = 50  # no field that is used is nested deeper than ten levels
MAX_INT_DIGITS = 400

# An unterminated string counts as one token, so that the search takes linear time.
_BRACKET_OR_STRING = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)


def decode(body: bytes) -> Any:
    """Return the JSON value in `body`. Raises NotJson when it is not UTF-8 or not JSON."""
    try:
        return decode_text(body.decode())
    except UnicodeDecodeError:
        raise NotJson("body is not UTF-8") from None


def decode_text(text: str) -> Any:
    """Return the JSON value in `text`. Raises NotJson.

    Values nested deeper than MAX_DEPTH become null, and numbers of more than MAX_INT_DIGITS digits infinity.
    Lone surrogates are kept.
    """
    try:
        return orjson.loads(text)  # in a third of the time
    except orjson.JSONDecodeError:  # also for deep nesting, long numbers and lone surrogates
        pass
    try:
        return _LENIENT.decode(_shallow(text))
    except json.JSONDecodeError:
        raise NotJson("body is not JSON") from None


def _shallow(text: str) -> str:
    """Return JSON with null in place of each value that is nested deeper than MAX_DEPTH."""
    kept = []
    depth = end = 0
    for token in _BRACKET_OR_STRING.finditer(text):
        match token[0]:
            case "[" | "{":
                depth += 1
                if depth == MAX_DEPTH + 1:
                    kept += [text[end : token.start()], "null"]
            case "]" | "}":
                depth -= 1
                if depth == MAX_DEPTH:
                    end = token.end()
    return "".join([*kept, text[end:] if depth <= MAX_DEPTH else ""])


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INT_DIGITS else float("inf")


_LENIENT = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_int)
