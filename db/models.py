"""The tables. `users` is what applications read; the others belong to this service."""

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Index,
    String,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.merge.address import EMAIL_PATTERN

TIMESTAMPTZ = DateTime(timezone=True)
FILLFACTOR = 85  # percent of a page, in tables whose rows are updated: the rest is for updates in place
EMAIL_INDEX = "idx_users_email"
VIEWS = ("organizations", "organization_members")  # what applications read of them; made by revision 0005


class Base(DeclarativeBase):
    """The declarative base. Its metadata equals what the migrations create; a test compares them."""

    # The type of each column that names no other.
    type_annotation_map: ClassVar = {
        str: String(255),
        int: BigInteger,
        datetime: TIMESTAMPTZ,
        dict[str, Any]: JSONB,
    }


class User(Base):
    """One row per user at Clerk. Applications read it and join it by `clerk_id` or `id`."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("clerk_id", name="idx_users_clerk_id"),
        UniqueConstraint("email", name=EMAIL_INDEX),
        CheckConstraint(f"email ~ '{EMAIL_PATTERN}'", name="email_format"),
        CheckConstraint("role IN ('admin', 'user')", name="role_known"),
        {"postgresql_with": {"fillfactor": FILLFACTOR}},
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    clerk_id: Mapped[str]
    email: Mapped[str]
    name: Mapped[str]
    organization: Mapped[str | None]
    role: Mapped[str] = mapped_column(String(50), server_default="user")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_login_at: Mapped[datetime | None]


class UserSync(Base):
    """The sync's state for one Clerk id, kept for good: newest versions, and whether the user was deleted.

    A version is two columns in ms. Once `deleted_at` is set, the row holds no personal data.
    """

    __tablename__ = "user_sync"
    __table_args__ = (
        # Only the address: with the claim's version the entry would change with every profile, and keep
        # PostgreSQL from updating the row in place. Few users ever claim one address.
        Index("idx_user_sync_claim", "claimed_email", postgresql_where=text("claimed_email IS NOT NULL")),
        {"postgresql_with": {"fillfactor": FILLFACTOR}},
    )

    clerk_id: Mapped[str] = mapped_column(primary_key=True)
    profile_updated_at: Mapped[int | None]
    profile_observed_at: Mapped[int | None]
    claimed_email: Mapped[str | None]
    claim_updated_at: Mapped[int | None]
    claim_observed_at: Mapped[int | None]
    last_login_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    claim_verified: Mapped[bool] = mapped_column(server_default=false())
    instance_id: Mapped[str | None]
    instance_seen_at: Mapped[int | None]


class InstanceSync(Base):
    """A Clerk instance that has ever written to these tables, by delivery or by API."""

    __tablename__ = "instance_sync"

    id: Mapped[str] = mapped_column(primary_key=True)
    first_seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class UserProfile(Base):
    """The fields of Clerk's user object that PROFILE_FIELDS names, of the newest profile."""

    __tablename__ = "user_profiles"

    clerk_id: Mapped[str] = mapped_column(primary_key=True)
    profile: Mapped[dict[str, Any]]
    updated_at: Mapped[datetime]


class OrganizationSync(Base):
    """The sync's state for one organization, with ORGANIZATION_SOURCE=membership."""

    __tablename__ = "organization_sync"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    name_updated_at: Mapped[int | None]
    name_observed_at: Mapped[int | None]
    deleted_at: Mapped[datetime | None]
    slug: Mapped[str | None]
    image_url: Mapped[str | None] = mapped_column(Text)


class MembershipSync(Base):
    """The sync's state for one membership; deleted with its user.

    The user is a part of the key, because a transaction writes the row only after it has locked the user's
    row in `user_sync`.
    """

    __tablename__ = "membership_sync"
    __table_args__ = (Index("idx_membership_sync_organization_id", "organization_id"),)

    clerk_id: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str]
    joined_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    role: Mapped[str | None]
    role_updated_at: Mapped[int | None]
    role_observed_at: Mapped[int | None]


class WebhookEvent(Base):
    """The ledger: one row per delivery applied, written in the transaction of its effect."""

    __tablename__ = "webhook_events"
    __table_args__ = (
        Index("idx_webhook_events_applied_at", "applied_at"),
        Index("idx_webhook_events_clerk_id", "clerk_id", "applied_at"),
    )

    svix_id: Mapped[str] = mapped_column(Text, primary_key=True)
    type: Mapped[str] = mapped_column(Text)
    clerk_id: Mapped[str]
    event_at: Mapped[datetime | None]
    received_at: Mapped[datetime]
    applied_at: Mapped[datetime] = mapped_column(server_default=func.now())
    outcome: Mapped[str] = mapped_column(Text)


class SyncProgress(Base):
    """The progress of a long task that reads all of Clerk's users: ids and counts, no personal data.

    It is in the same database as the rows that the task writes, so that both are emptied and restored
    together.
    """

    __tablename__ = "sync_progress"

    task: Mapped[str] = mapped_column(String(50), primary_key=True)
    state: Mapped[dict[str, Any]]
    saved_at: Mapped[datetime] = mapped_column(server_default=func.now())
