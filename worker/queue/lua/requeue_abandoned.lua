-- Queue again jobs that plain RQ workers have abandoned, a limited number at a time.
--
-- Two kinds: a started job whose entry in the started registry has expired (entries of this service's workers
-- never expire), and a job that was in the intermediate queue for too long without being started. A job that has
-- been started or finished by now is not changed.
--
-- KEYS[1] started jobs (sorted set of `job id:execution`)
-- KEYS[2] the queue (list)
-- KEYS[3] where plain RQ workers have a job between queue and start (list)
-- KEYS[4] when each job was first seen in KEYS[3], in s (sorted set)
-- ARGV[1] the prefix of a job's hash
-- ARGV[2] after how many s in KEYS[3] a job is abandoned
-- ARGV[3] the maximum number of jobs
--
-- Returns the number of jobs.

local started, queue, intermediate, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local job_prefix, stuck_after, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = tonumber(redis.call('TIME')[1])
local count = 0
local function job_of(entry)
  return string.match(entry, '^(.*):[^:]*$') or entry
end
local function put_back(id)
  redis.call('LPUSH', queue, id)
  redis.call('HSET', job_prefix .. id, 'status', 'queued')
  count = count + 1
end
local function status_of(id)
  local status = redis.pcall('HGET', job_prefix .. id, 'status')
  return type(status) == 'string' and status or nil
end
local expired = redis.call('ZRANGEBYSCORE', started, '-inf', now, 'LIMIT', 0, limit)
for _, entry in ipairs(expired) do
  redis.call('ZREM', started, entry)
end
local waiting = redis.call('LRANGE', intermediate, 0, limit - 1)
if #expired == 0 and #waiting == 0 then
  redis.call('DEL', seen)
  return 0
end
local taken = {}
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started, '(' .. now, '+inf')) do
  taken[job_of(entry)] = true
end
for _, entry in ipairs(expired) do
  local id = job_of(entry)
  if not taken[id] and status_of(id) == 'started' then
    put_back(id)
  end
end
local seen_at = {}
for _, id in ipairs(waiting) do
  if not taken[id] then
    seen_at[id] = tonumber(redis.call('ZSCORE', seen, id) or now)
  end
end
redis.call('DEL', seen)
for id, at in pairs(seen_at) do
  local status = status_of(id)
  if not status then
    redis.call('LREM', intermediate, 0, id)
  elseif at <= now - stuck_after then
    redis.call('LREM', intermediate, 0, id)
    if status == 'queued' or status == 'started' then
      put_back(id)
    end
  else
    redis.call('ZADD', seen, at, id)
  end
end
return count
