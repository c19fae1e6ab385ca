-- Queue a delivery once: one round trip from the receiver.
--
-- A new delivery is queued; one whose job failed is queued again; any other known one is a duplicate. A full
-- queue accepts none. The time of receipt is recorded in every case.
--
-- KEYS[1] the job's hash
-- KEYS[2] the queue (list)
-- KEYS[3] the names of all queues (set)
-- KEYS[4] failed jobs (sorted set)
-- KEYS[5] canceled jobs (sorted set)
-- KEYS[6] when a delivery was last received, in ms (string)
-- ARGV[1] the svix-id
-- ARGV[2] the time of receipt in ms
-- ARGV[3] the maximum length of the queue
-- ARGV[4] and on: fields and values of the job's hash that belong to this delivery
--
-- Returns -1 queue full, 0 duplicate, 1 queued, 2 requeued.
-- `$common` stands for the fields that all jobs have in common: as arguments they would take a tenth of
-- the receiver's CPU time per delivery.

local job, queue, queues = KEYS[1], KEYS[2], KEYS[3]
local failed, canceled, received = KEYS[4], KEYS[5], KEYS[6]
local id, now_ms, max_depth = ARGV[1], ARGV[2], tonumber(ARGV[3])
local known = redis.call('HMGET', job, 'data', 'status')
local answer = 1
if known[1] then
  local status = known[2]
  if status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then
    redis.call('SET', received, now_ms)
    return 0
  end
  answer = 2
end
if redis.call('LLEN', queue) >= max_depth then
  redis.call('SET', received, now_ms)
  return -1
end
redis.call('HSET', job, $common, unpack(ARGV, 4))
if answer == 2 then
  redis.call('PERSIST', job)
  redis.call('HDEL', job, 'exc_info', 'enqueued_at', 'started_at', 'ended_at', 'worker_name')
  redis.call('ZREM', failed, id)
  redis.call('ZREM', canceled, id)
end
if redis.call('RPUSH', queue, id) == 1 then
  redis.call('SADD', queues, queue)
end
redis.call('SET', received, now_ms)
return answer
