-- Schedule one job that this consumer still has reserved for later, with all its retries: another
-- transaction has locked its row.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] started jobs (sorted set of `job id:consumer id`)
-- KEYS[3] scheduled jobs (sorted set)
-- KEYS[4] jobs that wait for a lock (sorted set, by the time since which they wait)
-- KEYS[5] the job's hash
-- ARGV[1] the job id
-- ARGV[2] the consumer id
-- ARGV[3] in how many s the job is due again, by Redis's clock
-- ARGV[4] since when it waits, in s since the epoch
-- ARGV[5] the job's new `meta`
--
-- Returns 1, or 0 if this consumer no longer has the job.

local reserved, started, scheduled, waiting, key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id, consumer_id, due_in, since, meta = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('LREM', reserved, 0, id) == 0 then
  return 0
end
redis.call('ZREM', started, id .. ':' .. consumer_id)
if redis.call('EXISTS', key) == 0 then
  return 0
end
redis.call('HSET', key, 'status', 'scheduled', 'meta', meta)
redis.call('ZADD', scheduled, redis.call('TIME')[1] + due_in, id)
redis.call('ZADD', waiting, since, id)
return 1
