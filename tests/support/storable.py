"""What PostgreSQL can hold, and nothing else may come out of an event."""

import re
from datetime import UTC, datetime, timedelta

from db.merge.address import storable_address
from db.merge.change import Organization, UserChange

CLERK_ID = "[A-Za-z0-9_-]{1,200}"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def assert_storable(change: UserChange) -> None:
    """Fail unless the tables can hold every part of `change`."""
    assert re.fullmatch(CLERK_ID, change.clerk_id)
    times = [change.login_at, change.deleted_at]
    for membership in change.memberships:
        assert re.fullmatch(CLERK_ID, membership.id)
        assert re.fullmatch(CLERK_ID, membership.organization_id)
        times += [membership.joined_at, membership.ended_at]
    for organization in change.organizations:
        assert_storable_organization(organization)
    if change.profile:
        times += [*change.profile.version, change.profile.created_at]
        assert_text(change.profile.name)
        assert change.profile.name
        assert_text(change.profile.organization)
        assert change.profile.role in ("admin", "user")
    if change.email:
        times += change.email.version
        assert_text(change.email.address)
        assert change.email.address is None or storable_address(change.email.address) == change.email.address
    for time in times:
        assert_time(time)


def assert_storable_organization(organization: Organization) -> None:
    """Fail unless the tables can hold every part of `organization`."""
    assert re.fullmatch(CLERK_ID, organization.id)
    assert (organization.name is None) == (organization.version is None)
    assert_text(organization.name)
    for time in (*(organization.version or ()), organization.deleted_at):
        assert_time(time)


def assert_text(text: str | None) -> None:
    """Fail unless a varchar(255) in UTF-8 can hold `text`."""
    if text is not None:
        assert len(text) <= 255
        assert "\0" not in text
        assert not re.search("[\ud800-\udfff]", text)


def assert_time(time: int | None) -> None:
    """Fail unless `time` is a whole number of ms that a datetime can hold, and not before 1970."""
    if time is not None:
        assert type(time) is int
        assert time >= 0
        assert EPOCH + timedelta(milliseconds=time)
