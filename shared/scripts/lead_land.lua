-- lead_land: publish the value an application computed for all who ask.
-- KEYS  1 entry:K, 2 flight:K, 3 waiters:K:T, 4 outcome:K:T, 5 tags, 6 landed, 7 invalidations
-- ARGV  1 K, 2 T, 3 epoch, 4 ttl (ms), 5 serve stale for (ms), 6 keep for errors for (ms), 7 probation (ms), 8 meta JSON,
--       9 value, 10 log limit, 11 most answers waiting for PostgreSQL, 12 keep the outcome for (ms),
--       13 the leader's tags (newline-joined), 14 end of the lease (ms, server clock)
-- Returns {'LOST'} or {reason, now (ms), waiters, fresh until (ms)}; reason 'stored' or why it was not: 'overtaken'
--   (a newer flight replaced this one, whose lease lasts), 'invalidated', 'superseded', 'no-store', 'many-tags'. The same
--   again when it is called again, with the first call's `now`.
-- Closes: one who was frozen past its lease storing over what was computed since (token), or telling those who have
-- asked again since (lease); a value computed from facts older than an invalidation (epoch against markers); a waiter who
-- joins between the store and the replies (the flight is gone in the same step, so he finds the entry or begins anew).
local key, token, epoch = ARGV[1], ARGV[2], ARGV[3]
local done = redis.call('GET', KEYS[4])
if done then
  local reason, at, fresh = string.match(done, '^(%S+) (%d+) (%d+)')
  if not fresh then return { 'LOST' } end
  return { reason, tonumber(at), redis.call('LRANGE', KEYS[3], 0, -1), tonumber(fresh) }
end
local flight = redis.call('HMGET', KEYS[2], 'token', 'tags', 'ttl', 'store', 'replaces')
local now, current = now_ms(), flight[1] == token
if not current and now >= tonumber(ARGV[14]) then return { 'LOST' } end
if not current then flight = {} end

local labels = lines(flight[2] or ARGV[13])
local ttl, stale, err = tonumber(flight[3] or ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local present = current and redis.call('GET', KEYS[1])
local entry = present and head(present)
local reason = current and (unstorable(KEYS[5], key, labels, epoch, flight[4], entry) or 'stored') or 'overtaken'
if reason == 'stored' then
  if entry or flight[5] or stale > 0 then tell_replaced(KEYS[7], ARGV[10], key) end
  local text = compose(epoch, now, entry, ttl, stale, err, labels, ARGV[8], ARGV[9])
  keep_value(KEYS[1], KEYS[6], ARGV[11], key, text, ttl + stale + err, ARGV[7])
end
if current then redis.call('DEL', KEYS[2]) end
redis.call('SET', KEYS[4], string.format('%s %d %d', reason, now, now + ttl), 'PX', ARGV[12])
return { reason, now, redis.call('LRANGE', KEYS[3], 0, -1), now + ttl }
