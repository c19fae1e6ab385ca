-- Delete one failed job and everything that RQ keeps about it.
--
-- A job that is no longer failed is not changed. An entry of the registry without a job is removed.
--
-- KEYS[1] the job's hash
-- KEYS[2] failed jobs (sorted set)
-- KEYS[3] and on: the other keys of the job
-- ARGV[1] the job id
--
-- Returns 0 no such job, 1 not failed any more, 2 discarded.

local job, failed, id = KEYS[1], KEYS[2], ARGV[1]
local known = redis.pcall('HMGET', job, 'data', 'status')
redis.call('ZREM', failed, id)
if not known[1] then
  return 0
end
if known[2] ~= 'failed' and known[2] ~= 'stopped' then
  return 1
end
redis.call('DEL', job, unpack(KEYS, 3))
return 2
