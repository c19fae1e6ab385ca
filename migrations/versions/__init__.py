"""One file per change of the schema; each can be applied and undone."""
