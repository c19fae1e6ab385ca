"""The Lua scripts that move jobs. Each is atomic: a process killed at any instruction leaves no job nowhere.

A job's id is at any moment in one of: the queue's list, the held list of one holder (a worker, or a part of
it), or a registry of RQ. Its hash says the same in `status`. Key names and hash fields are RQ's own (see
`worker.queue.rq_format`), so that RQ's tools read and move the same jobs.

A Redis that is full refuses a script only at its first write, and only when that write needs memory: what
follows a write is never refused, so no script stops half-way. The receiver's script begins with a write that
needs memory, a worker's with one that needs none (ZREM, LREM, RPOP), because what a worker does makes room.
Source: redis.io, "Scripting with Lua", on scripts when memory has run out.
"""

from collections.abc import Mapping

# One round trip from the receiver: a new delivery is queued; one whose job failed is queued anew; one that is
# known is a duplicate; one that finds the queue too long is not taken, but it came. -1 too long, 0 duplicate,
# 1 queued, 2 requeued. The fields that all jobs have in common are part of the script: as arguments they
# would cost the receiver a tenth of a delivery.
_ENQUEUE = """
local job, queue, queues = KEYS[1], KEYS[2], KEYS[3]
local failed, canceled, received = KEYS[4], KEYS[5], KEYS[6]
local id, now_ms, max_depth = ARGV[1], ARGV[2], tonumber(ARGV[3])
local known = redis.call('HMGET', job, 'data', 'status')
local answer = 1
if known[1] then
  local status = known[2]
  if status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then
    redis.call('SET', received, now_ms)
    return 0
  end
  answer = 2
end
if redis.call('LLEN', queue) >= max_depth then
  redis.call('SET', received, now_ms)
  return -1
end
redis.call('HSET', job, $common, unpack(ARGV, 4))
redis.call('PERSIST', job)
if answer == 2 then
  redis.call('HDEL', job, 'exc_info')
  redis.call('ZREM', failed, id)
  redis.call('ZREM', canceled, id)
end
redis.call('RPUSH', queue, id)
redis.call('SADD', queues, queue)
redis.call('SET', received, now_ms)
return answer
"""


def enqueue(common: Mapping[str, str | int]) -> str:
    """Return the receiver's script, for jobs with these fields in common."""
    parts = [f"'{part}'" for field in common.items() for part in field]
    return _ENQUEUE.replace("$common", ", ".join(parts))


# Say that a worker lives, by Redis's own clock: those of the machines may differ.
HEARTBEAT = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], redis.call('TIME')[1], ARGV[1])
"""

# In a Redis that is full, forget what was finished longest ago, and so take what is finished after. Changes
# nothing otherwise: ZADD XX adds no member, and is refused all the same when there is no room.
_MAKE_ROOM = """
local function make_room(finished, count, job_prefix, result_prefix)
  local answer = redis.pcall('ZADD', finished, 'XX', 0, '')
  if type(answer) ~= 'table' or not string.find(answer.err or '', 'OOM', 1, true) then return end
  for _, id in ipairs(redis.call('ZRANGE', finished, 0, count - 1)) do
    if redis.call('HGET', job_prefix .. id, 'status') == 'finished' then
      redis.call('DEL', job_prefix .. id, result_prefix .. id)
    end
    redis.call('ZREM', finished, id)
  end
end
"""

# Fill the worker's held list up to a number of jobs or bytes, mark its jobs started, and return them. What is
# held already comes first: after a lost answer the same call returns the same jobs.
TAKE = (
    _MAKE_ROOM
    + """
local queue, held, holders, started, suspended = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local worker, limit, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now, job_prefix, holder = ARGV[4], ARGV[5], ARGV[7]
make_room(KEYS[6], 2 * limit + 1, job_prefix, ARGV[6])
redis.call('ZREM', holders, holder)
redis.call('ZADD', holders, redis.call('TIME')[1], holder)
if redis.call('EXISTS', suspended) == 1 then
  return false
end
local ids = redis.call('LRANGE', held, 0, -1)
local jobs, entries, bytes, i = {}, {}, 0, 0
-- Ids without a job are passed over, but not for so long that Redis keeps others waiting.
while #jobs < limit and bytes < max_bytes and i < 10 * limit do
  i = i + 1
  local id = ids[i]
  if not id then
    id = redis.call('LMOVE', queue, held, 'LEFT', 'RIGHT')
    if not id then break end
  end
  local key = job_prefix .. id
  -- What is no hash is no job: pcall's error has no [1] either.
  local job = redis.pcall('HMGET', key, 'data', 'created_at', 'retries_left', 'retry_intervals', 'meta')
  if job[1] then
    redis.call('HSET', key, 'status', 'started', 'started_at', now, 'last_heartbeat', now,
               'worker_name', worker)
    redis.call('PERSIST', key)
    entries[#entries + 1] = '+inf'
    entries[#entries + 1] = id .. ':' .. holder
    bytes = bytes + #job[1]
    jobs[#jobs + 1] = {id, job[1], job[2] or '', job[3] or '', job[4] or '', job[5] or ''}
  else
    redis.call('LREM', held, 0, id)
    redis.call('ZREM', started, id .. ':' .. holder)
  end
end
if #entries > 0 then
  redis.call('ZADD', started, unpack(entries))
end
return jobs
"""
)

# Mark jobs finished, those that this worker still holds: one that was given to another in between is the
# other's to finish, and one that was deleted stays so. The counts go to the worker's own hash, as RQ does it.
FINISH = """
local held, started, finished, worker_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker, holder, now, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local job_prefix, result_prefix = ARGV[5], ARGV[6]
local expires = tonumber(redis.call('TIME')[1]) + ttl
local ids = redis.call('LRANGE', held, 0, -1)
local mine = {}
for _, id in ipairs(ids) do
  mine[id] = true
end
local done, executions, results = {}, {}, {}
for i = 7, #ARGV, 2 do
  local id = ARGV[i]
  if mine[id] then
    mine[id] = nil
    done[#done + 1] = id
    executions[#done] = id .. ':' .. holder
    results[id] = ARGV[i + 1]
  end
end
if #done == 0 then return 0 end
redis.call('ZREM', started, unpack(executions))
if #done == #ids then
  redis.call('DEL', held)
else
  for _, id in ipairs(done) do
    redis.call('LREM', held, 0, id)
  end
end
local entries = {}
for _, id in ipairs(done) do
  local key = job_prefix .. id
  if redis.call('EXISTS', key) == 1 then
    redis.call('HSET', key, 'status', 'finished', 'ended_at', now)
    redis.call('EXPIRE', key, ttl)
    redis.call('XADD', result_prefix .. id, 'MAXLEN', 10, '*', 'type', '1', 'worker_name', worker,
               'return_value', results[id])
    redis.call('EXPIRE', result_prefix .. id, ttl)
    entries[#entries + 1] = expires
    entries[#entries + 1] = id
  end
end
if #entries > 0 then
  redis.call('ZADD', finished, unpack(entries))
end
if redis.call('EXISTS', worker_key) == 1 then
  redis.call('HINCRBY', worker_key, 'successful_job_count', #done)
end
return #done
"""

# Put one job that this worker still holds into the failed registry, or, when `due` is not empty, into the
# scheduled one with a retry less.
FAIL = """
local held, started, registry, worker_key, results = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local key, id, worker, holder, now = KEYS[6], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ttl, due = tonumber(ARGV[5]), ARGV[6]
if redis.call('LREM', held, 0, id) == 0 then
  return 0
end
redis.call('ZREM', started, id .. ':' .. holder)
if redis.call('EXISTS', key) == 0 then
  return 0
end
redis.call('HSET', key, 'ended_at', now, 'meta', ARGV[7])
if due ~= '' then
  redis.call('HSET', key, 'status', 'scheduled')
  redis.call('HINCRBY', key, 'retries_left', -1)
  redis.call('ZADD', registry, due, id)
else
  redis.call('HSET', key, 'status', 'failed', 'exc_info', ARGV[8])
  redis.call('EXPIRE', key, ttl)
  redis.call('ZADD', registry, redis.call('TIME')[1] + ttl, id)
  redis.call('XADD', results, 'MAXLEN', 10, '*', 'type', '2', 'worker_name', worker, 'exc_string', ARGV[9])
  redis.call('EXPIRE', results, ttl)
end
if redis.call('EXISTS', worker_key) == 1 then
  redis.call('HINCRBY', worker_key, 'failed_job_count', 1)
end
return 1
"""

# Put what a worker holds back to the front of the queue, in its order. Used by the worker itself, and by the
# others once it has not been heard of for too long.
_RELEASE = """
local function give_back(held, queue, started, holder, job_prefix)
  local count = 0
  while true do
    local id = redis.call('RPOP', held)
    if not id then return count end
    redis.call('LPUSH', queue, id)
    redis.call('ZREM', started, id .. ':' .. holder)
    if redis.call('EXISTS', job_prefix .. id) == 1 then
      redis.call('HSET', job_prefix .. id, 'status', 'queued')
    end
    count = count + 1
  end
end
"""

RELEASE = (
    _RELEASE
    + """
return give_back(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2])
"""
)

RECOVER_ORPHANS = (
    _RELEASE
    + """
local holders, queue, started = KEYS[1], KEYS[2], KEYS[3]
local silent_after, forget_after, job_prefix, held_prefix = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now = tonumber(redis.call('TIME')[1])
local count = 0
local function give_back_all(from, to)
  for _, holder in ipairs(redis.call('ZRANGEBYSCORE', holders, from, to)) do
    count = count + give_back(held_prefix .. holder, queue, started, holder, job_prefix)
  end
end
give_back_all('-inf', now - silent_after)
-- Heard of in the future: Redis's clock has been set back, and of those who live it hears again at once.
give_back_all(now + silent_after, '+inf')
-- A worker that was frozen, not killed, may wake and take again. Its name is kept long past that.
redis.call('ZREMRANGEBYSCORE', holders, '-inf', now - forget_after)
return count
"""
)

# A failed job that is to be replayed or discarded: what is not failed (any more) is left alone, and an entry
# of the registry without such a job behind it goes. 0 gone, 1 not failed any more, else the script goes on.
_IF_FAILED = """
local job, failed, id = KEYS[1], KEYS[2], ARGV[1]
local known = redis.pcall('HMGET', job, 'data', 'status')
redis.call('ZREM', failed, id)
if not known[1] then
  return 0
end
if known[2] ~= 'failed' and known[2] ~= 'stopped' then
  return 1
end
"""

# Put one failed job back into the queue, with all its retries.
REPLAY = (
    _IF_FAILED
    + """
local queue, queues, now, intervals, retries = KEYS[3], KEYS[4], ARGV[2], ARGV[3], ARGV[4]
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', now, 'started_at', '', 'ended_at', '',
           'worker_name', '', 'retry_intervals', intervals, 'retries_left', retries)
redis.call('HDEL', job, 'exc_info')
redis.call('PERSIST', job)
redis.call('RPUSH', queue, id)
redis.call('SADD', queues, queue)
return 2
"""
)

# Delete one failed job and all that RQ keeps about it.
DISCARD = (
    _IF_FAILED
    + """
redis.call('DEL', job, unpack(KEYS, 3))
return 2
"""
)

# Add what a process has counted since it last did, once, however often it has to be sent: KEYS[2] holds the
# number of the last such parcel from this process. After the counts come the latest moments of something.
ADD_COUNTS = """
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
"""

# Count one attempt; a limited number of them in each window of time. Returns how many there were.
COUNT_ATTEMPT = """
local count = redis.call('INCR', KEYS[1])
if count == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return count
"""

# Put back what plain RQ workers have left: a job that one had started and is not heard of since, which is an
# entry of the started registry that has expired (those of our own workers never do); and one that has stood
# in their intermediate queue for too long without being started. No more than so many at a time. What is in
# somebody's hand by now, or done, is not put back. `seen` is when each was first seen in that queue.
REQUEUE_ABANDONED = """
local started, queue, intermediate, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local job_prefix, stuck_after, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = tonumber(redis.call('TIME')[1])
local count = 0
local function job_of(entry)
  return string.match(entry, '^(.*):[^:]*$') or entry
end
local function put_back(id)
  redis.call('LPUSH', queue, id)
  redis.call('HSET', job_prefix .. id, 'status', 'queued')
  count = count + 1
end
local function status_of(id)
  local status = redis.pcall('HGET', job_prefix .. id, 'status')
  return type(status) == 'string' and status or nil
end
local expired = redis.call('ZRANGEBYSCORE', started, '-inf', now, 'LIMIT', 0, limit)
for _, entry in ipairs(expired) do
  redis.call('ZREM', started, entry)
end
local waiting = redis.call('LRANGE', intermediate, 0, limit - 1)
if #expired == 0 and #waiting == 0 then
  redis.call('DEL', seen)
  return 0
end
local in_hand = {}
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started, '(' .. now, '+inf')) do
  in_hand[job_of(entry)] = true
end
for _, entry in ipairs(expired) do
  local id = job_of(entry)
  if not in_hand[id] and status_of(id) == 'started' then
    put_back(id)
  end
end
local seen_at = {}
for _, id in ipairs(waiting) do
  if not in_hand[id] then
    seen_at[id] = tonumber(redis.call('ZSCORE', seen, id) or now)
  end
end
redis.call('DEL', seen)
for id, at in pairs(seen_at) do
  local status = status_of(id)
  if not status then
    redis.call('LREM', intermediate, 0, id)
  elseif at <= now - stuck_after then
    redis.call('LREM', intermediate, 0, id)
    if status == 'queued' or status == 'started' then
      put_back(id)
    end
  else
    redis.call('ZADD', seen, at, id)
  end
end
return count
"""

# Put the scheduled jobs that are due at the end of the queue, without a look at what is in them.
ENQUEUE_DUE = """
local scheduled, queue, queues = KEYS[1], KEYS[2], KEYS[3]
local job_prefix, due, now, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', scheduled, '-inf', due, 'LIMIT', 0, limit)) do
  redis.call('ZREM', scheduled, id)
  if redis.pcall('HGET', job_prefix .. id, 'status') == 'scheduled' then
    redis.call('HSET', job_prefix .. id, 'status', 'queued', 'enqueued_at', now)
    redis.call('RPUSH', queue, id)
    redis.call('SADD', queues, queue)
  end
end
"""

# Take a turn of a limited number, or say how much longer one that was taken counts: until that millisecond
# has passed on Redis's own clock. 1 taken, 0 there is none.
TAKE_TURN = """
local turns, turn, limit = KEYS[1], ARGV[1], tonumber(ARGV[2])
local counts_ms, longest_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', turns, '-inf', '(' .. now)
-- Counted for longer than any is: Redis's clock has been set back.
redis.call('ZREMRANGEBYSCORE', turns, '(' .. now + longest_ms, '+inf')
if not redis.call('ZSCORE', turns, turn) and redis.call('ZCARD', turns) >= limit then
  return 0
end
redis.call('ZADD', turns, now + counts_ms, turn)
redis.call('PEXPIRE', turns, longest_ms)
return 1
"""
