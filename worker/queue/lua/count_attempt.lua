-- Count one attempt within a window of time, or subtract one.
--
-- KEYS[1] the counter (string)
-- ARGV[1] the length of the window in s
-- ARGV[2] 1 to count an attempt, -1 to subtract one
--
-- Returns the number of attempts in this window.

local by = tonumber(ARGV[2])
if by < 0 and redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
local count = redis.call('INCRBY', KEYS[1], by)
if redis.call('TTL', KEYS[1]) < 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return count
