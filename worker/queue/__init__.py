"""RQ's queue in Redis: the receiver's side, the worker's side, failed jobs."""
