"""Updates in place: the index of claims contains no version, and each page has free space.

Revision 0006, after 0005. PostgreSQL updates a row in place (heap-only) if no indexed column changes and its
page has room. Every profile has a new version, so an index with the version prevented that. The fillfactor
applies to new pages; existing pages get free space when they are vacuumed.
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
