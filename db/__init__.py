"""PostgreSQL: the tables, the merge, and the one transaction that applies a batch of changes."""
