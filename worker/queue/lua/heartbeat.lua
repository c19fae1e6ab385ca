-- Record that a consumer is alive, by Redis's own clock: clocks of machines differ.
--
-- KEYS[1] consumers, by when each was last alive in s (sorted set)
-- ARGV[1] the consumer id

redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], redis.call('TIME')[1], ARGV[1])
