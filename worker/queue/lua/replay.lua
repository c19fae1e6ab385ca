-- Put one failed job back into the queue, with all its retries.
--
-- KEYS[1] the job's hash
-- KEYS[2] failed jobs (sorted set)
-- KEYS[3] the queue (list)
-- KEYS[4] the names of all queues (set)
-- ARGV[1] the job id
-- ARGV[2] the time, as RQ writes it
-- ARGV[3] the intervals of retries, as RQ writes them
-- ARGV[4] the number of retries
--
-- Returns 0 no such job, 1 not failed any more, 2 replayed.
--
-- include if_failed

local queue, queues, now, intervals, retries = KEYS[3], KEYS[4], ARGV[2], ARGV[3], ARGV[4]
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', now, 'started_at', '', 'ended_at', '',
           'worker_name', '', 'retry_intervals', intervals, 'retries_left', retries)
redis.call('HDEL', job, 'exc_info')
redis.call('PERSIST', job)
redis.call('RPUSH', queue, id)
redis.call('SADD', queues, queue)
return 2
