-- Delete one failed job and everything that RQ keeps about it.
--
-- KEYS[1] the job's hash
-- KEYS[2] failed jobs (sorted set)
-- KEYS[3] and on: the other keys of the job
-- ARGV[1] the job id
--
-- Returns 0 no such job, 1 not failed any more, 2 discarded.
--
-- include if_failed

redis.call('DEL', job, unpack(KEYS, 3))
return 2
