"""The ledger's rows of a batch, written in the transaction of their effect."""

from collections.abc import Sequence

from db.apply import statements
from db.connection.pipeline import Pipeline
from db.merge.incoming import Outcome, ReceivedChange
from db.times import to_datetime


def record(pipeline: Pipeline, batch: Sequence[ReceivedChange], outcomes: Sequence[Outcome]) -> None:
    """Send one row for each delivery; a svix-id that is there keeps its row."""
    rows = [
        (
            incoming.svix_id,
            incoming.type,
            incoming.subject,
            None if incoming.event_at is None else to_datetime(incoming.event_at),
            to_datetime(incoming.received_at),
            outcome.value,
        )
        for incoming, outcome in zip(batch, outcomes, strict=True)
        if incoming.svix_id is not None
    ]
    statements.send_rows(pipeline, statements.record_events(), rows)
