"""users; user_sync, the sync's state for each user; webhook_events, the ledger of deliveries.

Revision 0001, the first.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIMESTAMPTZ = sa.DateTime(timezone=True)
NOT_TEXT = r"\u0080-\u00a0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\uffff"
WIDE = rf"[^\u0001-\u007f{NOT_TEXT}]"
EMAIL_PATTERN = (
    rf'^[^\u0001-\u0020"(),:;<>@\[\\\]\u007f{NOT_TEXT}]+'
    rf"@([A-Za-z0-9.-]|{WIDE})+"
    rf"\.(([A-Za-z|]|{WIDE}){{2,}}|[Xx][Nn]--[A-Za-z0-9-]+)$"
)


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid, primary_key=True, server_default=sa.text("gen_random_uuid()")),
        sa.Column("clerk_id", sa.String(255), nullable=False),
        sa.Column("email", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("organization", sa.String(255)),
        sa.Column("role", sa.String(50), nullable=False, server_default="user"),
        sa.Column("created_at", TIMESTAMPTZ, nullable=False, server_default=sa.func.now()),
        sa.Column("last_login_at", TIMESTAMPTZ),
        sa.UniqueConstraint("clerk_id", name="idx_users_clerk_id"),
        sa.UniqueConstraint("email", name="idx_users_email"),
        sa.CheckConstraint(f"email ~ '{EMAIL_PATTERN}'", name="email_format"),
        sa.CheckConstraint("role IN ('admin', 'user')", name="role_known"),
    )
    op.create_table(
        "user_sync",
        sa.Column("clerk_id", sa.String(255), primary_key=True),
        sa.Column("profile_updated_at", sa.BigInteger),
        sa.Column("profile_observed_at", sa.BigInteger),
        sa.Column("claimed_email", sa.String(255)),
        sa.Column("claim_updated_at", sa.BigInteger),
        sa.Column("claim_observed_at", sa.BigInteger),
        sa.Column("last_login_at", TIMESTAMPTZ),
        sa.Column("deleted_at", TIMESTAMPTZ),
    )
    op.create_index(
        "idx_user_sync_claim",
        "user_sync",
        ["claimed_email", "claim_updated_at", "claim_observed_at", sa.text('clerk_id COLLATE "C"')],
        postgresql_where=sa.text("claimed_email IS NOT NULL"),
    )
    op.create_table(
        "webhook_events",
        sa.Column("svix_id", sa.Text, primary_key=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("clerk_id", sa.String(255), nullable=False),
        sa.Column("event_at", TIMESTAMPTZ),
        sa.Column("received_at", TIMESTAMPTZ, nullable=False),
        sa.Column("applied_at", TIMESTAMPTZ, nullable=False, server_default=sa.func.now()),
        sa.Column("outcome", sa.Text, nullable=False),
    )
    op.create_index("idx_webhook_events_applied_at", "webhook_events", ["applied_at"])
    op.create_index("idx_webhook_events_clerk_id", "webhook_events", ["clerk_id", "applied_at"])


def downgrade() -> None:
    op.drop_table("webhook_events")
    op.drop_table("user_sync")
    op.drop_table("users")
