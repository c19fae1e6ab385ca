"""The `clerk-sync` command: thin faces of what the storeys below do."""
