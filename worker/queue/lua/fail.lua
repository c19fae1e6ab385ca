-- Put one job that this consumer still has reserved into the failed registry, or schedule its retry.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] started jobs (sorted set of `job id:consumer id`)
-- KEYS[3] failed or scheduled jobs (sorted set)
-- KEYS[4] the worker's hash
-- KEYS[5] the job's results (stream)
-- KEYS[6] the job's hash
-- ARGV[1] the job id
-- ARGV[2] the worker's name
-- ARGV[3] the consumer id
-- ARGV[4] the time, as RQ writes it
-- ARGV[5] how long a failed job is kept, in s
-- ARGV[6] in how many s the retry is due, by Redis's clock; empty if the job has failed for good
-- ARGV[7] the job's new `meta`
-- ARGV[8] the traceback, for the hash
-- ARGV[9] the traceback, for the results
--
-- Returns 1, or 0 if this consumer no longer has the job.

local reserved, started, registry, worker_key, results = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local key, id, worker, consumer_id, now = KEYS[6], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ttl, retry_in = tonumber(ARGV[5]), ARGV[6]
local time = redis.call('TIME')[1]
if redis.call('LREM', reserved, 0, id) == 0 then
  return 0
end
redis.call('ZREM', started, id .. ':' .. consumer_id)
if redis.call('EXISTS', key) == 0 then
  return 0
end
redis.call('HSET', key, 'ended_at', now, 'meta', ARGV[7])
if retry_in ~= '' then
  redis.call('HSET', key, 'status', 'scheduled')
  redis.call('HINCRBY', key, 'retries_left', -1)
  redis.call('ZADD', registry, time + retry_in, id)
else
  redis.call('HSET', key, 'status', 'failed', 'exc_info', ARGV[8])
  redis.call('EXPIRE', key, ttl)
  redis.call('ZADD', registry, time + ttl, id)
  redis.call('XADD', results, 'MAXLEN', 10, '*', 'type', '2', 'worker_name', worker, 'exc_string', ARGV[9])
  redis.call('EXPIRE', results, ttl)
end
if redis.call('EXISTS', worker_key) == 1 then
  redis.call('HINCRBY', worker_key, 'failed_job_count', 1)
end
return 1
