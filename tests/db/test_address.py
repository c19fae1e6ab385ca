"""Which addresses `users.email` can hold: the parser and the column's check have to agree on every one."""

import re

import psycopg
from hypothesis import given, settings
from hypothesis import strategies as st

from db.merge.address import storable_address
from tests.support.hypothesis_settings import no_deadline

# What the check accepted before it learned of other addresses; all of that stays accepted.
PLAIN = r"\A[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Z|a-z]{2,}\Z"

ADDRESSES = {
    "plain": "ann@example.com",
    "capitals": "Ann.Lee@Example.COM",
    "a tag": "ann+clerk_test@example.com",
    "every plain character": "a.b_c%d+e-f@g-h.i.example",
    "the bar that the plain pattern lets through": "ann@example.c|m",
    "one letter": "a@b.co",
    "digits": "1@2.example",
    "dots in odd places": ".a..b.@-a-..example.com",
    "an apostrophe": "o'brien@example.com",
    "the other characters of RFC 5322": "!#$&*/=?^`{|}~@example.com",
    "a letter with an accent": "zoë@example.com",
    "an international domain": "zoë@münchen.example",
    "an international top level": "пример@почта.рф",
    "an international domain, encoded": "ann@xn--mnchen-3ya.example",
    "an encoded top level": "ann@xn--80a1acny.xn--p1ai",
    "Chinese": "用户@例子.广告",
    "Hindi, with combining marks": "संपर्क@डाटामेल.भारत",
    "Arabic": "بريد@مثال.عمان",
    "beyond the basic plane": "😀@example.com",
    "Clerk's own test address": "jane+clerk_test@example.com",
    "254 characters": "a" * 64 + "@" + "b" * 63 + "." + "c" * 63 + "." + "d" * 57 + ".co",
    "255 characters": "a" * 243 + "@example.com",
    "below the placeholders' domain": "ann@sub.placeholder.invalid",
    "a domain that ends like the placeholders'": "ann@notplaceholder.invalid",
}

NO_ADDRESSES = {
    "nothing": "",
    "no @": "ann.example.com",
    "two @": "ann@lee@example.com",
    "nothing before the @": "@example.com",
    "nothing after the @": "ann@",
    "no dot after the @": "ann@localhost",
    "a top level of one letter": "ann@example.c",
    "a number for a top level": "ann@192.0.2.1",
    "a dot at the end": "ann@example.com.",
    "a space": "ann lee@example.com",
    "a space at the end": "ann@example.com ",
    "a space at the start": " ann@example.com",
    "a tab": "ann\t@example.com",
    "a newline at the end": "ann@example.com\n",
    "a newline within": "ann@example.com\nbcc@example.com",
    "a no-break space": "ann\u00a0lee@example.com",
    "an ideographic space": "ann\u3000lee@example.com",
    "a zero-width space": "ann\u200b@example.com",
    "an override of the direction": "ann\u202e@example.com",
    "a control character": "ann\x07@example.com",
    "a display name": "Ann <ann@example.com>",
    "two addresses": "ann@example.com,ben@example.com",
    "a quoted local part": '"ann lee"@example.com',
    "an address literal": "ann@[192.0.2.1]",
    "a placeholder": "user_a@placeholder.invalid",
    "a placeholder in capitals": "user_a@PLACEHOLDER.Invalid",
    "256 characters": "a" * 244 + "@example.com",
    "NUL": "an\0n@example.com",
    "NUL in the domain": "ann@exa\0mple.com",
    "a lone surrogate": "an\ud800n@example.com",
    "a lone surrogate in the domain": "ann@exam\udfffple.com",
}


@no_deadline
@given(
    st.from_regex(PLAIN).filter(lambda a: len(a) <= 255 and not a.lower().endswith("@placeholder.invalid"))
)
def test_what_the_plain_pattern_accepts_is_stored(address: str) -> None:
    assert storable_address(address) == address


@no_deadline
@given(st.from_regex(re.compile(PLAIN, re.IGNORECASE)).filter(lambda address: len(address) <= 255))
def test_case_makes_no_difference(address: str) -> None:
    stored = {bool(storable_address(form)) for form in (address, address.swapcase()) if form.isascii()}
    assert len(stored) <= 1


def test_parser_and_column_take_every_address(connection: psycopg.Connection) -> None:
    for title, address in ADDRESSES.items():
        assert storable_address(address) == address, title
        assert column_holds(connection, address), title


def test_parser_and_column_refuse_what_is_no_address(connection: psycopg.Connection) -> None:
    for title, text in NO_ADDRESSES.items():
        assert storable_address(text) is None, title
        # This sync writes placeholders itself; NUL and lone surrogates PostgreSQL cannot even read.
        if "placeholder.invalid" not in text.lower() and not re.search("[\0\ud800-\udfff]", text):
            assert not column_holds(connection, text), title


def test_parser_and_column_agree_on_every_character(database_url: str) -> None:
    characters = [
        chr(code) for code in (*range(1, 0xD800), *range(0xE000, 0x11000), *range(0x1F600, 0x1F610))
    ]
    for before, after in (("a", "b@example.com"), ("a@b", ".com"), ("a@b.c", "d"), ("a@b.com", "")):
        addresses = [before + character + after for character in characters]
        assert accepted_by_column(database_url, addresses) == [bool(storable_address(a)) for a in addresses]


pieces = st.sampled_from(
    ["a", "Z", "0", ".", "..", "@", "-", "|", "'", " ", "\n", "é", "ß", "K", "xn--", "com", "\u200b"]
)


def test_parser_and_column_agree_on_odd_texts(database_url: str) -> None:
    @settings(no_deadline, max_examples=20)
    @given(st.lists(st.lists(pieces, max_size=9).map("".join), min_size=50, max_size=200))
    def agree(texts: list[str]) -> None:
        assert accepted_by_column(database_url, texts) == [bool(storable_address(text)) for text in texts]

    agree()


def column_holds(connection: psycopg.Connection, address: str) -> bool:
    """Say whether `users.email` takes `address`; nothing stays."""
    with connection.transaction(force_rollback=True):
        try:
            connection.execute(
                "INSERT INTO users (clerk_id, email, name) VALUES ('user_a', %s, 'Ann')", [address]
            )
        except (psycopg.errors.CheckViolation, psycopg.errors.StringDataRightTruncation):
            return False
        return True


def accepted_by_column(database_url: str, addresses: list[str]) -> list[bool]:
    """Return what the check on the column says of each address."""
    with psycopg.connect(database_url, prepare_threshold=None) as connection:
        row = connection.execute(
            "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint WHERE conname = 'email_format'"
        ).fetchone()
        assert row is not None
        query = (
            f"SELECT {row[0]} FROM unnest(%s::text[]) WITH ORDINALITY AS given (email, place) ORDER BY place"
        )
        return [bool(held) for (held,) in connection.execute(query.encode(), [addresses])]
