-- lead_fail: end a computation an application leads, without a value; its waiters are told by the caller.
-- KEYS  1 flight:K, 2 waiters:K:T, 3 outcome:K:T, 4 entry:K, 5 tags
-- ARGV  1 T, 2 keep the outcome for (ms), 3 end of the lease (ms, server clock), 4 K, 5 what is kept for errors may stand
--       in (1|0)
-- Returns {'LOST'} or {'failed', now (ms), waiters, the entry that stands in or ''}; the same again when it is called again,
-- with the first call's `now`.
-- Closes: one who was frozen past its lease ending the flight of who was elected after it (token), or telling those who
-- have asked again since (lease); a waiter who joins between the end and the replies (the flight is gone in the same step);
-- an entry that was invalidated standing in (epoch against markers, by the tags of all aboard).
local done = redis.call('GET', KEYS[3])
if done then
  local reason, at, kept = string.match(done, '^(%S+) (%d+)\n(.*)$')
  if reason ~= 'failed' then return { 'LOST' } end
  return { reason, tonumber(at), redis.call('LRANGE', KEYS[2], 0, -1), kept }
end
local now, kept = now_ms(), ''
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  kept = ARGV[5] == '1' and spare(KEYS[4], KEYS[5], ARGV[4], KEYS[1], ARGV[1]) or ''
  redis.call('DEL', KEYS[1])
elseif now >= tonumber(ARGV[3]) then
  return { 'LOST' }
end
redis.call('SET', KEYS[3], string.format('failed %d\n', now) .. kept, 'PX', ARGV[2])
return { 'failed', now, redis.call('LRANGE', KEYS[2], 0, -1), kept }
