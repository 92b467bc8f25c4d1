-- land: publish a flight's answer, once, by the worker that owns its fill.
-- KEYS  1 fills (or refreshes), 2 entry:K, 3 flight:K, 4 waiters:K:T, 5 outcome:K:T, 6 tags, 7 landed, 8 invalidations,
--       9 failed:K
-- ARGV  1 group, 2 consumer, 3 fill id, 4 K, 5 T, 6 epoch, 7 the leader's tags (newline-joined), 8 ttl (ms),
--       9 verdict of the quality gate ('' = storable), 10 keep the outcome for (ms), 11 meta JSON, 12 body, 13 log limit,
--       14 serve stale for (ms), 15 keep for errors for (ms), 16 probation (ms), 17 call JSON, 18 prompt ('' = not kept),
--       19 most answers waiting for PostgreSQL
-- Returns {'LOST'} or {reason, now (ms), waiters, fresh until (ms)}; reason 'stored' or why it was not:
--   'overtaken' (a newer flight replaced this one, or it was a bypass), 'invalidated', 'superseded', 'no-store', the verdict.
--   A flight that has an outcome already returns {'DONE', now (ms), waiters, outcome}.
-- Closes: a paused worker's late answer (ownership); an answer computed from facts older than an invalidation (epoch
-- against markers); an older flight's answer over a newer one's (epoch against the stored epoch); a waiter who joins
-- between the store and the replies (the flight is gone in the same step, so he finds the entry or begins anew).
local stream, group, consumer, id = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if not owns(stream, group, consumer, id) then return { 'LOST' } end
-- Landing renews the lease: the replies that follow have all of it.
redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')

local done = redis.call('GET', KEYS[5])
if done then return { 'DONE', now_ms(), redis.call('LRANGE', KEYS[4], 0, -1), done } end

local key, token, epoch = ARGV[4], ARGV[5], ARGV[6]
local flight = redis.call('HMGET', KEYS[3], 'token', 'tags', 'ttl', 'store', 'replaces')
local current = flight[1] == token
local labels = lines(current and flight[2] or ARGV[7])
local present = current and redis.call('GET', KEYS[2])
local entry = present and head(present)
local now = now_ms()
local ttl, stale, err = tonumber(current and flight[3] or ARGV[8]), tonumber(ARGV[14]), tonumber(ARGV[15])
local text = compose(epoch, now, entry, ttl, stale, err, labels, ARGV[11], ARGV[12])

local reason = 'overtaken'
if current then
  reason = ARGV[9] ~= '' and ARGV[9] or unstorable(KEYS[6], key, labels, epoch, flight[4], entry) or 'stored'
end
if reason == 'stored' and (entry or flight[5] or stale > 0) then tell_replaced(KEYS[8], ARGV[13], key) end
-- Every call is told to the durable tier, a stored answer with it. Only what is on its way there may leave Redis early, and
-- not while what landed half a probation ago is still on its way.
local probation, first = tonumber(ARGV[16]), redis.call('XRANGE', KEYS[7], '-', '+', 'COUNT', 1)[1]
local behind = first and now - tonumber(string.match(first[1], '^%d+')) > probation / 2
local told = redis.call('XLEN', KEYS[7]) < tonumber(ARGV[19])
if told then
  local message = { 'key', key, 'outcome', reason, 'call', ARGV[17] }
  if reason == 'stored' then message[7], message[8] = 'entry', text end
  if ARGV[18] ~= '' then message[#message + 1], message[#message + 2] = 'prompt', ARGV[18] end
  told = redis.call('XADD', KEYS[7], 'NOMKSTREAM', '*', unpack(message))
end
if reason == 'stored' then
  local life = ttl + stale + err
  redis.call('SET', KEYS[2], text, 'PX', told and not behind and math.min(life, probation) or life)
end
if current then redis.call('DEL', KEYS[3], KEYS[9]) end
redis.call('SET', KEYS[5], reason .. '\n' .. text, 'PX', ARGV[10])
return { reason, now, redis.call('LRANGE', KEYS[4], 0, -1), now + ttl }
