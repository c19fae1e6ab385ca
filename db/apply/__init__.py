"""The one transaction that writes users."""
