"""The merge: user changes, claims on addresses, and rows. Pure: no I/O, no framework."""
