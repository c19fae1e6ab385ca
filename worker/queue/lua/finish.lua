-- Mark the jobs finished that this consumer still has reserved.
--
-- A job that another consumer has taken over since is left to that one; a deleted job stays deleted. The
-- count goes to the worker's own hash, as RQ does it.
--
-- KEYS[1] the consumer's reserved jobs (list)
-- KEYS[2] started jobs (sorted set of `job id:consumer id`)
-- KEYS[3] finished jobs (sorted set)
-- KEYS[4] the worker's hash
-- ARGV[1] the worker's name
-- ARGV[2] the consumer id
-- ARGV[3] the time, as RQ writes it
-- ARGV[4] how long a finished job is kept, in s
-- ARGV[5] the prefix of a job's hash
-- ARGV[6] the prefix of a job's results
-- ARGV[7] and on: job id, encoded result, and so on
--
-- Returns the number of jobs that were finished.

local reserved, started, finished, worker_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker, consumer_id, now, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local job_prefix, result_prefix = ARGV[5], ARGV[6]
local expires = tonumber(redis.call('TIME')[1]) + ttl
local ids = redis.call('LRANGE', reserved, 0, -1)
local own = {}
for _, id in ipairs(ids) do
  own[id] = true
end
local done, executions, results = {}, {}, {}
for i = 7, #ARGV, 2 do
  local id = ARGV[i]
  if own[id] then
    own[id] = nil
    done[#done + 1] = id
    executions[#done] = id .. ':' .. consumer_id
    results[id] = ARGV[i + 1]
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
  local key = job_prefix .. id
  if redis.call('EXISTS', key) == 1 then
    redis.call('HSET', key, 'status', 'finished', 'ended_at', now)
    redis.call('EXPIRE', key, ttl)
    redis.call('XADD', result_prefix .. id, 'MAXLEN', 10, '*', 'type', '1', 'worker_name', worker,
               'return_value', results[id])
    redis.call('EXPIRE', result_prefix .. id, ttl)
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
