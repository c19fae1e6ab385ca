"""The canonical form of profile fields: the same before PostgreSQL stored them and after."""

import json
from typing import Any

import orjson
import psycopg
from hypothesis import given
from hypothesis import strategies as st

from db.merge.fields import canonical
from tests.support.hypothesis_settings import no_deadline

text = st.text(st.sampled_from(["a", "é", "\0", "\ud800", "😀", '"', "\\", "\n"]), max_size=4)
numbers = (
    st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(
        [10**400, 1e16, 1e19, -1e19, 1e25, 1e300, 5e-324, -0.0, 2**63, 2**64, -(2**63), 2**53 + 1]
    )
)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)


def test_what_postgresql_stores_has_the_same_canonical_form(connection: psycopg.Connection[Any]) -> None:
    @no_deadline
    @given(st.dictionaries(st.sampled_from(["a", "b"]), values))
    def comes_back(fields: dict[str, Any]) -> None:
        sent = canonical(fields)
        stored = connection.execute("SELECT (%s::jsonb)::text", [sent]).fetchone()
        assert stored
        assert canonical(orjson.loads(stored[0])) == sent == canonical(json.loads(sent))

    comes_back()


def test_values_nested_to_any_depth_become_null_at_one_depth() -> None:
    deep: Any = "end"
    for _ in range(900):
        deep = [deep]
    kept = canonical({"a": deep})
    assert kept == '{"a":' + "[" * 31 + "null" + "]" * 31 + "}"
