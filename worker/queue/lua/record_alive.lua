-- Record that a process is alive, by Redis's own clock: clocks of machines differ.
--
-- KEYS[1] processes, by when each was last alive in s (sorted set)
-- ARGV[1] the id of the process

local now = redis.call('TIME')[1]
-- In a full Redis the first write must be one that needs no memory: see worker/queue/scripts.py.
if type(redis.pcall('ZADD', KEYS[1], now, ARGV[1])) == 'table' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('ZADD', KEYS[1], now, ARGV[1])
end
