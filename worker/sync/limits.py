"""How much a reconciliation deletes and reads at a time, and what it takes for recent."""

from config import Settings

ALWAYS_ALLOWED = 10  # deletions of users, ends of memberships
RECENT_MS = 60_000  # Clerk may not show a younger change everywhere yet
ROWS_AT_A_TIME = 500


def deletions_allowed(settings: Settings, local: int) -> int:
    """Return how many of `local` rows may be deleted without --allow-deletes."""
    return max(ALWAYS_ALLOWED, int(local * settings.reconcile_max_delete / 100))
