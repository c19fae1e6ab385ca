"""The way to PostgreSQL: pool, pipeline, time-outs, errors."""
