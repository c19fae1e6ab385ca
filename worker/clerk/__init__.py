"""Everything specific to Clerk: its payloads, its API, and the changes that they contain."""
