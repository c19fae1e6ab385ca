-- Put jobs back whose list or registry was lost: queue them again, and failed ones into the failed registry.
-- Remove from that registry those that are not failed.
--
-- The caller scans all job hashes, some at a time. Searching a long queue for an id is slow, so the oldest job of
-- the queue is checked first: jobs are in the order in which they were queued, so only one that was queued later
-- can be in it. The number of searches per call is limited; the next scan continues.
--
-- KEYS[1] the queue (list)
-- KEYS[2] where plain RQ workers have a job between queue and start (list)
-- KEYS[3] started jobs (sorted set of `job id:consumer id`)
-- KEYS[4] scheduled jobs (sorted set)
-- KEYS[5] failed jobs (sorted set)
-- KEYS[6] consumers (sorted set)
-- KEYS[7] the names of all queues (set)
-- ARGV[1] the prefix of a job's hash
-- ARGV[2] the prefix of a consumer's reserved jobs
-- ARGV[3] the queue's name
-- ARGV[4] the time, as RQ writes it
-- ARGV[5] jobs that were queued or started after this time are not changed (a time in RQ's format)
-- ARGV[6] and on: job ids
--
-- Returns the number of jobs that were put back.
--
-- include lost

local queue, intermediate, started, scheduled, failed, consumers = unpack(KEYS, 1, 6)
local job_prefix, reserved_prefix, name, now, settled = unpack(ARGV, 1, 5)
local searches_left = 1000000 / (redis.call('LLEN', queue) + 1000)

local function oldest()
  local id = redis.call('LINDEX', queue, 0)
  local times = id and redis.pcall('HMGET', job_prefix .. id, 'enqueued_at', 'created_at')
  return times and (times[1] or times[2]) or now
end

local function is_lost(id, status, since, queued_before)
  if status == 'scheduled' then
    return not redis.call('ZSCORE', scheduled, id)
  elseif (status == 'queued' and since <= queued_before) or status == 'started' then
    searches_left = searches_left - 1
    return searches_left > 0 and since < settled
      and is_in_no_list(id, queue, intermediate, started, consumers, reserved_prefix)
  end
end

local count, queued_before = 0, oldest()
for i = 6, #ARGV do
  local id = ARGV[i]
  local job = job_prefix .. id
  local known = redis.pcall('HMGET', job, 'origin', 'status', 'enqueued_at', 'created_at', 'started_at', 'worker_name')
  local status = known[2]
  local since = status == 'started' and known[5] or known[3] or known[4] or ''
  -- `rq requeue` removes a job from the registry before it queues it: in between, this script puts it back.
  if known[1] == name and status ~= 'failed' and status ~= 'stopped' then
    redis.call('ZREM', failed, id)
  end
  if known[1] ~= name then
    -- A job of another queue, or no hash.
  elseif status == 'failed' and not redis.call('ZSCORE', failed, id) then
    local ttl = redis.call('TTL', job)
    redis.call('ZADD', failed, ttl > 0 and redis.call('TIME')[1] + ttl or '+inf', id)
    count = count + 1
  elseif is_lost(id, status, since, queued_before) then
    forget_started(started, id, known[6] or '')
    redis.call('HSET', job, 'status', 'queued', 'enqueued_at', now)
    redis.call('PERSIST', job)
    redis.call('RPUSH', queue, id)
    redis.call('SADD', KEYS[7], queue)
    count = count + 1
  end
end
return count
