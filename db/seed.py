"""Sample users for development."""

from db.apply import users
from db.connection.engine import Database
from db.merge.change import EmailClaim, Profile, UserChange, Version
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy

NAMES = ("Ada Lovelace", "Grace Hopper", "Alan Turing", "Katherine Johnson", "Edsger Dijkstra")
BEGINNING = 1_735_689_600_000  # 2025-01-01
DAY_MS = 24 * 3600 * 1000
CHUNK = 500


def seed_users(database: Database, count: int) -> int:
    """Add `count` users, always the same ones; return how many are new."""
    changes = [ReceivedChange(_user(i), None, "seed", None, 0) for i in range(count)]
    batches = (changes[start : start + CHUNK] for start in range(0, count, CHUNK))
    return sum(users.apply(database, batch, Policy()).count(Outcome.APPLIED) for batch in batches)


def _user(i: int) -> UserChange:
    created_at = BEGINNING + i * DAY_MS // 24
    version = Version(created_at, created_at)
    return UserChange(
        f"user_seed{i:06}",
        Profile(version, created_at, NAMES[i % len(NAMES)], None, "admin" if i % 10 == 0 else "user"),
        EmailClaim(version, f"user{i}@example.com"),
        created_at + DAY_MS if i % 3 else None,
    )
