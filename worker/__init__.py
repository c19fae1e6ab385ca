"""From a delivery on the queue to a change of a user: parse, change, merge, and the jobs around it."""
