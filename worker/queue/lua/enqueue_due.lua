-- Put the scheduled jobs that are due at the end of the queue, without a look at what is in them.
--
-- KEYS[1] scheduled jobs, by when each is due in s (sorted set)
-- KEYS[2] the queue (list)
-- KEYS[3] the names of all queues (set)
-- ARGV[1] the prefix of a job's hash
-- ARGV[2] the time in s since the epoch
-- ARGV[3] the same, as RQ writes it
-- ARGV[4] the greatest number of jobs

local scheduled, queue, queues = KEYS[1], KEYS[2], KEYS[3]
local job_prefix, due, now, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', scheduled, '-inf', due, 'LIMIT', 0, limit)) do
  redis.call('ZREM', scheduled, id)
  if redis.pcall('HGET', job_prefix .. id, 'status') == 'scheduled' then
    redis.call('HSET', job_prefix .. id, 'status', 'queued', 'enqueued_at', now)
    redis.call('RPUSH', queue, id)
    redis.call('SADD', queues, queue)
  end
end
