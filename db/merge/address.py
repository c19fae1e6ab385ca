"""The e-mail addresses that can be stored: one pattern for the check on the column and for the parser.

The pattern accepts what Clerk accepts: also the other characters that RFC 5322 allows before the @, letters
of every script (RFC 6531), and encoded top-level domains.
"""

import re

from db.merge.change import PLACEHOLDER_DOMAIN

MAX_LENGTH = 255

# Written with \uXXXX escapes and without \s, \w or case folding: those depend on the locale in PostgreSQL and
# on Unicode tables in Python, and both must accept exactly the same addresses.
_NOT_TEXT = r"\u0080-\u00a0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\uffff"
_LOCAL = rf'[^\u0001-\u0020"(),:;<>@\[\\\]\u007f{_NOT_TEXT}]+'
_WIDE = rf"[^\u0001-\u007f{_NOT_TEXT}]"
_DOMAIN = rf"([A-Za-z0-9.-]|{_WIDE})+"
_TOP_LEVEL = rf"(([A-Za-z|]|{_WIDE}){{2,}}|[Xx][Nn]--[A-Za-z0-9-]+)"

EMAIL_PATTERN = rf"^{_LOCAL}@{_DOMAIN}\.{_TOP_LEVEL}$"

_email = re.compile(EMAIL_PATTERN)
_NEVER_TEXT = re.compile("[\0\ud800-\udfff]")  # PostgreSQL cannot store such text


def storable_address(address: str) -> str | None:
    """Return `address` if `users.email` can hold it, else None.

    An address in the domain of the placeholders cannot be claimed.
    """
    if len(address) > MAX_LENGTH or _NEVER_TEXT.search(address) or not _email.fullmatch(address):
        return None
    if address.rpartition("@")[2].lower() == PLACEHOLDER_DOMAIN:
        return None
    return address
