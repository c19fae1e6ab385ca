-- Functions for other scripts: whether a job is missing in the list or registry that its hash names.
--
-- That happens when Redis evicts a list or registry, or an administrator deletes it.

local function in_reserved_lists(consumers, reserved_prefix)
  local found = {}
  for _, consumer_id in ipairs(redis.call('ZRANGE', consumers, 0, -1)) do
    for _, id in ipairs(redis.call('LRANGE', reserved_prefix .. consumer_id, 0, -1)) do
      found[id] = true
    end
  end
  return found
end

-- Jobs that plain RQ workers run: an entry of this service's workers never expires, so it is no proof.
local function run_by_plain_workers(started)
  local found = {}
  local now = redis.call('TIME')[1]
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started, '(' .. now, '(inf')) do
    found[string.match(entry, '^(.*):[^:]*$') or entry] = true
  end
  return found
end

local reserved, running
local function is_in_no_list(id, queue, intermediate, started, consumers, reserved_prefix)
  reserved = reserved or in_reserved_lists(consumers, reserved_prefix)
  running = running or run_by_plain_workers(started)
  return not (reserved[id] or running[id] or redis.call('LPOS', intermediate, id) or redis.call('LPOS', queue, id))
end

local function forget_started(started, id, worker)
  -- Any thread of the worker may have taken it: see MAX_CONSUMERS in worker/runner/batch_worker.py.
  local entry = id .. ':' .. worker
  redis.call('ZREM', started, entry, entry .. '.2', entry .. '.3')
end
