"""Tables without a database."""

from collections.abc import Sequence

from db.apply.tables import Tables
from db.merge.incoming import Outcome, ReceivedChange


class Applied(Tables):
    """Stands where the database does: keeps the batches, and refuses those with users given as `refused`."""

    def __init__(self, refusal: Exception | None = None, refused: Sequence[str] = ()) -> None:
        self.batches: list[Sequence[ReceivedChange]] = []
        self._refusal = refusal
        self._refused = set(refused)

    @property
    def calls(self) -> list[list[str]]:
        """The ids of the deliveries of each batch."""
        return [[str(one.svix_id) for one in batch] for batch in self.batches]

    def apply(self, batch: Sequence[ReceivedChange], *, waits_briefly: bool = False) -> list[Outcome]:  # noqa: ARG002
        """Return `applied` and `stale` in turn."""
        self.batches.append(batch)
        if self._refusal and self._refused & set(self.calls[-1]):
            raise self._refusal
        return [Outcome.STALE if i % 2 else Outcome.APPLIED for i, _ in enumerate(batch)]

    def locked(self, batch: Sequence[ReceivedChange]) -> frozenset[str]:  # noqa: ARG002 - none is
        """Return that none is."""
        return frozenset()
