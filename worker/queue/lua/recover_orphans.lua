-- Put the jobs of dead consumers back into the queue.
--
-- KEYS[1] consumers, by when each was last alive in s (sorted set)
-- KEYS[2] the queue (list)
-- KEYS[3] started jobs (sorted set of `job id:consumer id`)
-- ARGV[1] after how many s of silence a consumer is dead
-- ARGV[2] after how many s its id is forgotten
-- ARGV[3] the prefix of a job's hash
-- ARGV[4] the prefix of a consumer's reserved jobs
--
-- Returns the number of jobs.
--
-- include release_reserved

local consumers, queue, started = KEYS[1], KEYS[2], KEYS[3]
local silent_after, forget_after, job_prefix, reserved_prefix = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now = tonumber(redis.call('TIME')[1])
local count = 0
local function release_all(from, to)
  for _, consumer_id in ipairs(redis.call('ZRANGEBYSCORE', consumers, from, to)) do
    count = count + release(reserved_prefix .. consumer_id, queue, started, consumer_id, job_prefix)
  end
end
release_all('-inf', now - silent_after)
-- Heard of in the future: Redis's clock has been set back, and of those who live it hears again at once.
release_all(now + silent_after, '+inf')
-- A worker that was frozen, not killed, may wake and take again. Its name is kept long past that.
redis.call('ZREMRANGEBYSCORE', consumers, '-inf', now - forget_after)
return count
