"""All that knows Clerk: its payloads, its API, and what they say of a user."""
