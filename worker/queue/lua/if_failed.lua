-- The beginning of scripts that replay or discard one failed job.
--
-- A job that is not failed any more is left alone. An entry of the registry without a job behind it goes.
--
-- Returns 0 no such job, 1 not failed any more; else the script goes on.

local job, failed, id = KEYS[1], KEYS[2], ARGV[1]
local known = redis.pcall('HMGET', job, 'data', 'status')
redis.call('ZREM', failed, id)
if not known[1] then
  return 0
end
if known[2] ~= 'failed' and known[2] ~= 'stopped' then
  return 1
end
