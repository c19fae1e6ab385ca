-- Take one of a limited number of turns, or set how long a taken one still counts, by Redis's clock.
--
-- KEYS[1] turns, by the ms until which each counts (sorted set)
-- ARGV[1] the id of this turn
-- ARGV[2] the maximum number of turns
-- ARGV[3] for how many ms this turn counts
-- ARGV[4] the longest that any turn counts, in ms
--
-- Returns 1 taken, 0 none is free.

local turns, turn, limit = KEYS[1], ARGV[1], tonumber(ARGV[2])
local counts_ms, longest_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', turns, '-inf', '(' .. now)
-- Turns that would count for longer than the maximum: Redis's clock has been set back.
redis.call('ZREMRANGEBYSCORE', turns, '(' .. now + longest_ms, '+inf')
if not redis.call('ZSCORE', turns, turn) and redis.call('ZCARD', turns) >= limit then
  return 0
end
redis.call('ZADD', turns, now + counts_ms, turn)
redis.call('PEXPIRE', turns, longest_ms)
return 1
