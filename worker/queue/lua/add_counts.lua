-- Add the counts of a process since its last flush to the totals, once, however often they are sent.
--
-- KEYS[1] the totals (hash)
-- KEYS[2] the number of the last delta of this process (string)
-- KEYS[3] since when Redis has had its data, in ms (string)
-- ARGV[1] the number of this delta
-- ARGV[2] now in ms
-- ARGV[3] the number of counts
-- ARGV[4] and on: field and amount of each count, then field and time of each timestamp, in s
--
-- If Redis has an earlier number than it has confirmed, it lost its newest data: an old snapshot was restored, or
-- a replica that lagged became the primary. What it has dates from now, then.
--
-- Returns 1, or 0 if this delta was added before.

local totals, sent, number, counts = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[3])
local last = redis.call('GET', sent)
if last == number then
  return 0
end
redis.call('SET', sent, number, 'EX', 3600)
if last and last + 1 < tonumber(number) then
  redis.call('SET', KEYS[3], ARGV[2])
end
for i = 4, 3 + 2 * counts, 2 do
  redis.call('HINCRBYFLOAT', totals, ARGV[i], ARGV[i + 1])
end
for i = 4 + 2 * counts, #ARGV, 2 do
  if (tonumber(redis.call('HGET', totals, ARGV[i])) or 0) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', totals, ARGV[i], ARGV[i + 1])
  end
end
return 1
