-- Put one failed job back into the queue, with all its retries; also a job whose list or registry was lost.
--
-- KEYS[1] the job's hash
-- KEYS[2] failed jobs (sorted set)
-- KEYS[3] the queue (list)
-- KEYS[4] the names of all queues (set)
-- KEYS[5] where plain RQ workers have a job between queue and start (list)
-- KEYS[6] started jobs (sorted set of `job id:consumer id`)
-- KEYS[7] scheduled jobs (sorted set)
-- KEYS[8] consumers (sorted set)
-- ARGV[1] the job id
-- ARGV[2] the time, as RQ writes it
-- ARGV[3] the intervals of retries, as RQ writes them
-- ARGV[4] the number of retries
-- ARGV[5] the prefix of a consumer's reserved jobs
--
-- Returns 0 no such job, 1 no longer failed, 2 replayed.
--
-- include lost

local job, id, queue = KEYS[1], ARGV[1], KEYS[3]
local known = redis.pcall('HMGET', job, 'data', 'status', 'worker_name')
redis.call('ZREM', KEYS[2], id)
if not known[1] then
  return 0
end
local status = known[2]
if status == 'queued' or status == 'started' then
  if not is_in_no_list(id, queue, KEYS[5], KEYS[6], KEYS[8], ARGV[5]) then
    return 1
  end
  forget_started(KEYS[6], id, known[3] or '')
elseif status == 'scheduled' then
  if redis.call('ZSCORE', KEYS[7], id) then
    return 1
  end
elseif status ~= 'failed' and status ~= 'stopped' then
  return 1
end
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', ARGV[2], 'retry_intervals', ARGV[3],
           'retries_left', ARGV[4])
redis.call('HDEL', job, 'exc_info', 'started_at', 'ended_at', 'worker_name')
redis.call('PERSIST', job)
redis.call('RPUSH', queue, id)
redis.call('SADD', KEYS[4], queue)
return 2
