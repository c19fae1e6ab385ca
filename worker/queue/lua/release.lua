-- Put a consumer's reserved jobs back to the front of the queue, in their order.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] the queue (list)
-- KEYS[3] started jobs (sorted set of `job id:consumer id`)
-- ARGV[1] the consumer id
-- ARGV[2] the prefix of a job's hash
--
-- Returns the number of jobs.
--
-- include release_reserved

return release(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2])
