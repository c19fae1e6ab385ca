-- Mark the jobs finished that this consumer still has reserved.
--
-- A job that another consumer has taken over is not changed; a deleted job stays deleted. The worker's hash
-- counts finished jobs, as in RQ. No result is stored: RQ's tools do not need one, and the ledger has the outcome
-- of the delivery.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] started jobs (sorted set of `job id:consumer id`)
-- KEYS[3] finished jobs (sorted set)
-- KEYS[4] the worker's hash
-- ARGV[1] the consumer id
-- ARGV[2] the time, as RQ writes it
-- ARGV[3] how long a finished job is kept, in s
-- ARGV[4] the prefix of a job's hash
-- ARGV[5] and on: job ids
--
-- Returns the number of jobs that were finished.

local reserved, started, finished, worker_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local consumer_id, now, ttl, job_prefix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local expires = tonumber(redis.call('TIME')[1]) + ttl
local ids = redis.call('LRANGE', reserved, 0, -1)
local own = {}
for _, id in ipairs(ids) do
  own[id] = true
end
local done, executions = {}, {}
for i = 5, #ARGV do
  local id = ARGV[i]
  if own[id] then
    own[id] = nil
    done[#done + 1] = id
    executions[#done] = id .. ':' .. consumer_id
  end
end
if #done == 0 then return 0 end
redis.call('ZREM', started, unpack(executions))
if #done == #ids then
  redis.call('DEL', reserved)
else
  for _, id in ipairs(done) do
    redis.call('LREM', reserved, 0, id)
  end
end
local entries = {}
for _, id in ipairs(done) do
  if redis.call('EXPIRE', job_prefix .. id, ttl) == 1 then
    redis.call('HSET', job_prefix .. id, 'status', 'finished', 'ended_at', now)
    entries[#entries + 1] = expires
    entries[#entries + 1] = id
  end
end
if #entries > 0 then
  redis.call('ZADD', finished, unpack(entries))
end
if redis.call('EXISTS', worker_key) == 1 then
  redis.call('HINCRBY', worker_key, 'successful_job_count', #done)
end
return #done
