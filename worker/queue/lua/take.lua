-- Reserve jobs for a consumer, mark them started, and return them.
--
-- The reserved list is filled up to a number of jobs or bytes. Jobs that are reserved already come first:
-- after a lost answer the same call returns the same jobs.
--
-- KEYS[1] the queue (list)
-- KEYS[2] the consumer's reserved jobs (list)
-- KEYS[3] consumers, by when each was last alive in s (sorted set)
-- KEYS[4] started jobs (sorted set of `job id:consumer id`)
-- KEYS[5] set while `rq suspend` is in force
-- KEYS[6] finished jobs (sorted set)
-- KEYS[7] since when Redis has had its data, in ms (string)
-- ARGV[1] the worker's name
-- ARGV[2] the number of jobs
-- ARGV[3] the number of bytes of their data
-- ARGV[4] the time, as RQ writes it
-- ARGV[5] the prefix of a job's hash
-- ARGV[6] the prefix of a job's results
-- ARGV[7] the consumer id
--
-- Returns false while suspended, else a list of {id, data, created_at, retries_left, retry_intervals, meta}, and a
-- list of the ids whose job is not there: Redis may have evicted it. They are dropped.

-- Free memory in a full Redis: delete the jobs that finished first. ZADD XX adds no member, so it changes nothing,
-- but it is refused if Redis is full.
local function make_room(finished, count, job_prefix, result_prefix)
  local answer = redis.pcall('ZADD', finished, 'XX', 0, '')
  if type(answer) ~= 'table' or not string.find(answer.err or '', 'OOM', 1, true) then return end
  for _, id in ipairs(redis.call('ZRANGE', finished, 0, count - 1)) do
    if redis.call('HGET', job_prefix .. id, 'status') == 'finished' then
      redis.call('DEL', job_prefix .. id, result_prefix .. id)
    end
    redis.call('ZREM', finished, id)
  end
end

local queue, reserved, consumers, started, suspended = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local worker, limit, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now, job_prefix, consumer_id = ARGV[4], ARGV[5], ARGV[7]
make_room(KEYS[6], 2 * limit + 1, job_prefix, ARGV[6])
redis.call('ZREM', consumers, consumer_id)
redis.call('ZADD', consumers, redis.call('TIME')[1], consumer_id)
if redis.call('EXISTS', suspended) == 1 then
  return false
end
local ids = redis.call('LRANGE', reserved, 0, -1)
local jobs, missing, entries, bytes, i = {}, {}, {}, 0, 0
-- Ids without a job are skipped, a limited number, so that Redis is not blocked for long.
while #jobs < limit and bytes < max_bytes and i < 10 * limit do
  i = i + 1
  local id = ids[i]
  if not id then
    id = redis.call('LMOVE', queue, reserved, 'LEFT', 'RIGHT')
    if not id then break end
  end
  local key = job_prefix .. id
  -- What is no hash is no job: pcall's error has no [1] either.
  local job = redis.pcall('HMGET', key, 'data', 'created_at', 'retries_left', 'retry_intervals', 'meta')
  if job[1] then
    redis.call('HSET', key, 'status', 'started', 'started_at', now, 'worker_name', worker)
    -- It has failed before, and RQ keeps a failed job for a limited time.
    if job[5] then
      redis.call('PERSIST', key)
    end
    entries[#entries + 1] = '+inf'
    entries[#entries + 1] = id .. ':' .. consumer_id
    bytes = bytes + #job[1]
    jobs[#jobs + 1] = {id, job[1], job[2] or '', job[3] or '', job[4] or '', job[5] or ''}
  else
    redis.call('LREM', reserved, 0, id)
    redis.call('ZREM', started, id .. ':' .. consumer_id)
    missing[#missing + 1] = id
  end
end
if #entries > 0 then
  redis.call('ZADD', started, unpack(entries))
end
if #missing > 0 then
  redis.call('SET', KEYS[7], redis.call('TIME')[1] .. '000')
end
return {jobs, missing}
