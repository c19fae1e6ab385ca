-- Raise an error if a delivery cannot be queued or taken now.
--
-- It needs what the scripts of a delivery need: EVAL, keys in one slot (no cluster), a Redis that accepts writes
-- (a SET NX is refused like any other write, even if the key exists), and LMOVE, which is in Redis since 6.2.
--
-- KEYS[1] the hash of a job that does not exist
-- KEYS[2] the queue (list)
-- KEYS[3] failed jobs (sorted set)
-- KEYS[4] since when silence counts, in ms (string): the first probe's time
-- ARGV[1] now in ms

redis.call('HMGET', KEYS[1], 'data', 'status')
redis.call('LMOVE', KEYS[1], KEYS[1], 'LEFT', 'RIGHT')
redis.call('ZREM', KEYS[3], KEYS[1])
redis.call('SET', KEYS[4], ARGV[1], 'NX')
return redis.call('LLEN', KEYS[2])
