-- Add the counts of a process since its last flush to the totals, once, however often they are sent.
--
-- KEYS[1] the totals (hash)
-- KEYS[2] the number of the last delta of this process (string)
-- ARGV[1] the number of this delta
-- ARGV[2] the number of counts
-- ARGV[3] and on: field and amount of each count, then field and time of each timestamp, in s
--
-- Returns 1, or 0 if this delta was added before.

local totals, sent, number, counts = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2])
if redis.call('GET', sent) == number then
  return 0
end
redis.call('SET', sent, number, 'EX', 3600)
for i = 3, 2 + 2 * counts, 2 do
  redis.call('HINCRBYFLOAT', totals, ARGV[i], ARGV[i + 1])
end
for i = 3 + 2 * counts, #ARGV, 2 do
  if (tonumber(redis.call('HGET', totals, ARGV[i])) or 0) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', totals, ARGV[i], ARGV[i + 1])
  end
end
return 1
