"""The `clerk-sync` command. Its modules only call the packages below."""
