"""user_profiles, roles of memberships, and the views organizations and organization_members.

Revision 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"

ORGANIZATIONS = """
    CREATE VIEW organizations AS
    SELECT id, name, slug, image_url FROM organization_sync WHERE deleted_at IS NULL
"""
# A user who left and joined again may have two memberships here until the end of the first one is reported.
# The view shows only the newest.
MEMBERS = """
    CREATE VIEW organization_members AS
    SELECT DISTINCT ON (membership.organization_id, membership.clerk_id)
           membership.organization_id, membership.clerk_id, membership.role, membership.joined_at
    FROM membership_sync AS membership
    LEFT JOIN organization_sync AS organization ON organization.id = membership.organization_id
    WHERE membership.ended_at IS NULL AND organization.deleted_at IS NULL
    ORDER BY membership.organization_id, membership.clerk_id, membership.joined_at DESC,
             membership.id COLLATE "C" DESC
"""
VIEWS = {"organizations": ORGANIZATIONS, "organization_members": MEMBERS}


def upgrade() -> None:
    op.create_table(
        "user_profiles",
        sa.Column("clerk_id", sa.String(255), primary_key=True),
        sa.Column("profile", JSONB, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.add_column("membership_sync", sa.Column("role", sa.String(255)))
    op.add_column("membership_sync", sa.Column("role_updated_at", sa.BigInteger))
    op.add_column("membership_sync", sa.Column("role_observed_at", sa.BigInteger))
    op.add_column("organization_sync", sa.Column("slug", sa.String(255)))
    op.add_column("organization_sync", sa.Column("image_url", sa.Text))
    for name, statement in VIEWS.items():
        if _found(name) is None:  # else the name belongs to the application
            op.execute(statement)


def downgrade() -> None:
    for name in reversed(VIEWS):
        if "organization_sync" in (_found(name) or ""):
            op.execute(f"DROP VIEW {name}")
    for name in ("image_url", "slug"):
        op.drop_column("organization_sync", name)
    for name in ("role_observed_at", "role_updated_at", "role"):
        op.drop_column("membership_sync", name)
    op.drop_table("user_profiles")


def _found(name: str) -> str | None:
    """Return the definition of the view with that name; "" for a table, None if there is neither."""
    query = sa.text(
        "SELECT coalesce(pg_get_viewdef(pg_class.oid), '') FROM pg_class"
        " JOIN pg_namespace ON pg_namespace.oid = relnamespace"
        " WHERE relname = :name AND nspname = current_schema()"
    )
    found: str | None = op.get_bind().scalar(query, {"name": name})
    return found
