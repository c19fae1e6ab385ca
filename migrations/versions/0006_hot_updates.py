"""Room for updates in place: no version in the index of claims, and free space in each page.

Revision 0006, after 0005. An index entry that holds a version moves with every profile, so no update of
`user_sync` could be heap-only. New pages alone have the free space; old ones get it as they are vacuumed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

VERSIONS: list[str | sa.TextClause] = [
    "claim_verified",
    "claim_updated_at",
    "claim_observed_at",
    sa.text('clerk_id COLLATE "C"'),
]


def upgrade() -> None:
    _index_claims("claimed_email")
    op.execute("ALTER TABLE users SET (fillfactor = 85)")
    op.execute("ALTER TABLE user_sync SET (fillfactor = 85)")


def downgrade() -> None:
    op.execute("ALTER TABLE user_sync RESET (fillfactor)")
    op.execute("ALTER TABLE users RESET (fillfactor)")
    _index_claims("claimed_email", *VERSIONS)


def _index_claims(*columns: str | sa.TextClause) -> None:
    op.drop_index("idx_user_sync_claim", "user_sync")
    op.create_index(
        "idx_user_sync_claim",
        "user_sync",
        list(columns),
        postgresql_where=sa.text("claimed_email IS NOT NULL"),
    )
