-- Count one attempt within a window of time.
--
-- KEYS[1] the counter (string)
-- ARGV[1] the length of the window in s
--
-- Returns the number of attempts in this window.

local count = redis.call('INCR', KEYS[1])
if count == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return count
