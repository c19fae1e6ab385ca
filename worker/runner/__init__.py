"""The RQ worker: takes batches of jobs, applies them, and settles them."""
