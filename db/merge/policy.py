"""The settings that decide what is written to `users`."""

from typing import NamedTuple

from config import Settings


class Policy(NamedTuple):
    """Whether a deleted user's row stays without personal data, and which columns this sync writes.

    `owns_organization` is about the profile; with `follows_memberships` the column is written from those, as
    the name, id or slug that `organization_value` says. `keeps_fields`: `user_profiles` is written.
    `instance_id` is the Clerk instance whose changes count; None for any.
    """

    anonymize: bool = False
    owns_role: bool = True
    owns_organization: bool = True
    follows_memberships: bool = False
    organization_value: str = "name"
    keeps_fields: bool = False
    instance_id: str | None = None

    @property
    def left_alone(self) -> tuple[str, ...]:
        """The columns of `users` that a profile does not write."""
        role = () if self.owns_role else ("role",)
        return role if self.owns_organization else (*role, "organization")

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """Return the policy that the settings state."""
        return cls(
            anonymize=settings.user_deletion == "anonymize",
            owns_role=settings.role_source != "none",
            owns_organization=settings.organization_source == "metadata",
            follows_memberships=settings.organization_source == "membership",
            organization_value=settings.organization_value,
            keeps_fields=bool(settings.profile_fields),
            instance_id=settings.clerk_instance_id,
        )
