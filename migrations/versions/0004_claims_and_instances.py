"""instance_sync; columns of user_sync for verified claims and for the Clerk instance that reported a user.

Revision 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

CLAIM: list[str | sa.TextClause] = ["claim_updated_at", "claim_observed_at", sa.text('clerk_id COLLATE "C"')]


def upgrade() -> None:
    op.add_column(
        "user_sync", sa.Column("claim_verified", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("user_sync", sa.Column("instance_id", sa.String(255)))
    op.add_column("user_sync", sa.Column("instance_seen_at", sa.BigInteger))
    _index_claims("claimed_email", "claim_verified")
    op.create_table(
        "instance_sync",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )


def downgrade() -> None:
    op.drop_table("instance_sync")
    _index_claims("claimed_email")
    for name in ("instance_seen_at", "instance_id", "claim_verified"):
        op.drop_column("user_sync", name)


def _index_claims(*first: str) -> None:
    op.drop_index("idx_user_sync_claim", "user_sync")
    op.create_index(
        "idx_user_sync_claim",
        "user_sync",
        [*first, *CLAIM],
        postgresql_where=sa.text("claimed_email IS NOT NULL"),
    )
