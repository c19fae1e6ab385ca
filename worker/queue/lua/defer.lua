-- Schedule one job that this consumer still has reserved for later, with all its retries: another
-- transaction has locked its row.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] started jobs (sorted set of `job id:consumer id`)
-- KEYS[3] scheduled jobs (sorted set)
-- KEYS[4] jobs that wait for a lock (sorted set, by the time since which they wait, in s of Redis's clock)
-- KEYS[5] the job's hash
-- ARGV[1] the job id
-- ARGV[2] the consumer id
-- ARGV[3] in how many s the job is due again, by Redis's clock
-- ARGV[4] the job's new `meta`
--
-- Returns 1, or 0 if this consumer no longer has the job.

local reserved, started, scheduled, waiting, key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id, consumer_id, due_in, meta = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('LREM', reserved, 0, id) == 0 then
  return 0
end
redis.call('ZREM', started, id .. ':' .. consumer_id)
if redis.call('EXISTS', key) == 0 then
  return 0
end
redis.call('HSET', key, 'status', 'scheduled', 'meta', meta)
local now = redis.call('TIME')[1]
redis.call('ZADD', scheduled, now + due_in, id)
redis.call('ZADD', waiting, 'NX', now, id)
return 1
