-- fail: end a flight that has no answer; its waiters get its own error.
-- KEYS  1 fills (or refreshes), 2 flight:K, 3 waiters:K:T, 4 outcome:K:T
-- ARGV  1 group, 2 consumer, 3 fill id, 4 T, 5 error JSON, 6 keep the outcome for (ms)
-- Returns {'LOST'}, {'DONE', now (ms), waiters, outcome} when it had ended already, or {'FAILED', now (ms), waiters}.
-- Closes: a paused worker's late error over another's answer (ownership); an error is never stored as an entry, and a
-- flight that replaced this one is left alone (token).
local stream, group, consumer, id = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if not owns(stream, group, consumer, id) then return { 'LOST' } end
redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
local done = redis.call('GET', KEYS[4])
if done then return { 'DONE', now_ms(), redis.call('LRANGE', KEYS[3], 0, -1), done } end
if redis.call('HGET', KEYS[2], 'token') == ARGV[4] then redis.call('DEL', KEYS[2]) end
redis.call('SET', KEYS[4], 'failed\n' .. ARGV[5], 'PX', ARGV[6])
return { 'FAILED', now_ms(), redis.call('LRANGE', KEYS[3], 0, -1) }
