-- placate: an answer for those who have waited long enough, while their flight goes on.
-- KEYS  1 fills (or refreshes), 2 flight:K, 3 waiters:K:T, 4 entry:K, 5 tags
-- ARGV  1 group, 2 consumer, 3 fill id, 4 T, 5 K, 6 how many waiters had theirs already
-- Returns {'LOST'}, {'NONE'}: no entry serves, or nobody new waits; {'ENTRY', now (ms), the waiters after those, entry}.
-- Closes: a paused worker telling those who belong to another's flight; an entry invalidated since it was stored (judged here,
-- by the labels of all aboard).
if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return { 'LOST' } end
local waiters = redis.call('LRANGE', KEYS[3], ARGV[6], -1)
local text = #waiters > 0 and spare(KEYS[4], KEYS[5], ARGV[5], KEYS[2], ARGV[4])
if not text then return { 'NONE' } end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return { 'ENTRY', now_ms(), waiters, text }
