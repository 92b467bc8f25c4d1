-- lead_fail: end a computation an application leads, without a value; its waiters are told by the caller.
-- KEYS  1 flight:K, 2 waiters:K:T, 3 outcome:K:T
-- ARGV  1 T, 2 keep the outcome for (ms), 3 end of the lease (ms, server clock)
-- Returns {'LOST'} or {'failed', now (ms), waiters}; the same again when it is called again, with the first call's `now`.
-- Closes: one who was frozen past its lease ending the flight of who was elected after it (token), or telling those who
-- have asked again since (lease); a waiter who joins between the end and the replies (the flight is gone in the same step).
local done = redis.call('GET', KEYS[3])
if done then
  local reason, at = string.match(done, '^(%S+) (%d+)')
  if reason ~= 'failed' then return { 'LOST' } end
  return { reason, tonumber(at), redis.call('LRANGE', KEYS[2], 0, -1) }
end
local now = now_ms()
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  redis.call('DEL', KEYS[1])
elseif now >= tonumber(ARGV[3]) then
  return { 'LOST' }
end
redis.call('SET', KEYS[3], string.format('failed %d', now), 'PX', ARGV[2])
return { 'failed', now, redis.call('LRANGE', KEYS[2], 0, -1) }
