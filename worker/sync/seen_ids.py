"""A set of ids in eight bytes each, for as many users as there may be."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import groupby


class IdSet:
    """Ids that are added first and looked up later.

    Their hashes are kept alone. Those are of 64 bits, and keyed anew in every process (PEP 456), so that
    no user can choose two ids that fall together.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._is_sorted = True

    def add(self, ids: Iterable[str]) -> None:
        """Add ids."""
        self._hashes.extend(map(hash, ids))
        self._is_sorted = False

    def __len__(self) -> int:
        self._sort()
        return len(self._hashes)

    def __contains__(self, id_: str) -> bool:
        self._sort()
        value = hash(id_)
        index = bisect_left(self._hashes, value)
        return index < len(self._hashes) and self._hashes[index] == value

    def _sort(self) -> None:
        if not self._is_sorted:
            self._hashes = array("q", (value for value, _ in groupby(sorted(self._hashes))))
            self._is_sorted = True
