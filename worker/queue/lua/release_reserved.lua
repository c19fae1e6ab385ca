-- A function for other scripts: put a consumer's reserved jobs back to the front of the queue, in their order.

local function release(reserved, queue, started, consumer_id, job_prefix)
  local count = 0
  while true do
    local id = redis.call('RPOP', reserved)
    if not id then return count end
    redis.call('LPUSH', queue, id)
    redis.call('ZREM', started, id .. ':' .. consumer_id)
    if redis.call('EXISTS', job_prefix .. id) == 1 then
      redis.call('HSET', job_prefix .. id, 'status', 'queued')
    end
    count = count + 1
  end
end
