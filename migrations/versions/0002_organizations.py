"""organization_sync and membership_sync, for ORGANIZATION_SOURCE=membership.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TIMESTAMPTZ = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "organization_sync",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(255)),
        sa.Column("name_updated_at", sa.BigInteger),
        sa.Column("name_observed_at", sa.BigInteger),
        sa.Column("deleted_at", TIMESTAMPTZ),
    )
    op.create_table(
        "membership_sync",
        sa.Column("clerk_id", sa.String(255), primary_key=True),
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("organization_id", sa.String(255), nullable=False),
        sa.Column("joined_at", TIMESTAMPTZ, nullable=False),
        sa.Column("ended_at", TIMESTAMPTZ),
    )
    op.create_index("idx_membership_sync_organization_id", "membership_sync", ["organization_id"])


def downgrade() -> None:
    op.drop_table("membership_sync")
    op.drop_table("organization_sync")
