-- Count one attempt within a window of time, unless there are too many, or subtract one.
--
-- KEYS[1] the counter (string)
-- ARGV[1] the length of the window in s
-- ARGV[2] 1 to count an attempt, -1 to subtract one
-- ARGV[3] the limit; an attempt beyond it is not counted
--
-- Returns the number of attempts in this window, with this one.

local by = tonumber(ARGV[2])
local count = tonumber(redis.call('GET', KEYS[1]) or 0) + by
if count < 0 or count > tonumber(ARGV[3]) then
  return count
end
redis.call('INCRBY', KEYS[1], by)
if redis.call('TTL', KEYS[1]) < 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return count
