"""A set of ids that takes eight bytes for each."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import groupby


class IdSet:
    """Ids that are added first and looked up later.

    Only their hashes are kept. These have 64 bits and a random key in every process (PEP 456), so that ids
    with the same hash cannot be constructed.
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
