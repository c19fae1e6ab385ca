"""What is known of a user and how it merges. Pure: no I/O, no framework."""
