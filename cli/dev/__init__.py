"""`clerk-sync dev`: the whole service on a bare machine."""
