"""Clerk's API into the tables: backfill, reconcile, pull."""
