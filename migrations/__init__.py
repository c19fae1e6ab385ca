"""The schema's history. `clerk-sync db upgrade` applies what is missing."""
