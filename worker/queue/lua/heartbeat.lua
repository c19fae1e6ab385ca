-- Everything that a worker does at intervals for the queue: record that it is alive, put the jobs of dead
-- consumers back into the queue, and queue the retries that are due.
--
-- Times are by Redis's clock, because the clocks of machines differ. An idle worker's call runs four commands.
-- RQ's scheduler also moves due jobs, so no retry is queued while it holds its lock.
--
-- KEYS[1] consumers, by when each was last alive in s (sorted set)
-- KEYS[2] the queue (list)
-- KEYS[3] started jobs (sorted set of `job id:consumer id`)
-- KEYS[4] scheduled jobs, by when each is due in s (sorted set)
-- KEYS[5] the names of all queues (set)
-- KEYS[6] the lock of RQ's scheduler
-- KEYS[7] the worker's hash
-- ARGV[1] after how many s of silence a consumer is dead
-- ARGV[2] after how many s its id is forgotten
-- ARGV[3] the prefix of a job's hash
-- ARGV[4] the prefix of a consumer's reserved jobs
-- ARGV[5] the maximum number of retries to queue
-- ARGV[6] the time, as RQ writes it
-- ARGV[7] the expiry of the worker's hash in s
-- ARGV[8] the number of consumers of this worker
-- ARGV[9] and on: their ids, then fields and values of the worker's hash, which may be none
--
-- Returns {jobs released, retries queued, whether Redis knew the worker (1 or 0), in how many s there is more
-- to do}.
--
-- include release_reserved

local consumers, queue, started, scheduled = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local dead_after, forget_after = tonumber(ARGV[1]), tonumber(ARGV[2])
local job_prefix, reserved_prefix, limit = ARGV[3], ARGV[4], tonumber(ARGV[5])
local first_field = 9 + ARGV[8]
local now = tonumber(redis.call('TIME')[1])

local own, alive = {}, {}
for i = 9, first_field - 1 do
  own[ARGV[i]] = true
  alive[#alive + 1] = now
  alive[#alive + 1] = ARGV[i]
end
-- In a full Redis the first write must be one that needs no memory: see worker/queue/scripts.py.
local new_consumers = redis.pcall('ZADD', consumers, unpack(alive))
if type(new_consumers) == 'table' then
  redis.call('ZREM', consumers, unpack(ARGV, 9, first_field - 1))
  redis.call('ZADD', consumers, unpack(alive))
  new_consumers = 0
end

local released, wait = 0, dead_after
local entries = redis.call('ZRANGE', consumers, 0, -1, 'WITHSCORES')
for i = 1, #entries, 2 do
  local id, age = entries[i], now - entries[i + 1]
  -- Alive in the future: Redis's clock was set back. A consumer that lives is recorded again soon.
  if age >= dead_after or age <= -dead_after then
    released = released + release(reserved_prefix .. id, queue, started, id, job_prefix)
    if age > forget_after then
      redis.call('ZREM', consumers, id)
    end
  elseif not own[id] then
    wait = math.min(wait, dead_after - age)
  end
end

local retried = 0
local first = redis.call('ZRANGE', scheduled, 0, 0, 'WITHSCORES')
if first[1] and tonumber(first[2]) > now then
  wait = math.min(wait, first[2] - now)
elseif first[1] and redis.call('EXISTS', KEYS[6]) == 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', scheduled, '-inf', now, 'LIMIT', 0, limit)) do
    redis.call('ZREM', scheduled, id)
    if redis.pcall('HGET', job_prefix .. id, 'status') == 'scheduled' then
      redis.call('HSET', job_prefix .. id, 'status', 'queued', 'enqueued_at', ARGV[6])
      redis.call('RPUSH', queue, id)
      retried = retried + 1
    end
  end
  redis.call('SADD', KEYS[5], queue)
  wait = 1
end

local is_known = new_consumers == 0
if ARGV[first_field] then
  local new_fields = redis.call('HSET', KEYS[7], unpack(ARGV, first_field))
  is_known = is_known and new_fields * 2 < #ARGV - first_field + 1
  redis.call('EXPIRE', KEYS[7], ARGV[7])
end
return {released, retried, is_known and 1 or 0, math.ceil(wait)}
