-- put: store a value an application computed by itself.
-- KEYS  1 entry:K, 2 tags, 3 landed, 4 invalidations
-- ARGV  1 K, 2 epoch ('' = now), 3 tags (newline-joined), 4 ttl (ms), 5 serve stale for (ms), 6 keep for errors for (ms),
--       7 probation (ms), 8 meta JSON, 9 value, 10 log limit, 11 most answers waiting for PostgreSQL
-- Returns 'stored', or why not: 'invalidated', 'superseded'.
-- Closes: a value computed from facts older than an invalidation of its tags, and stored after it (epoch against markers);
-- an older value over one of a newer epoch.
local key, labels = ARGV[1], lines(ARGV[3])
local last = redis.call('HGET', KEYS[2], '#last') or '0-0'
local epoch = ARGV[2]
-- No entry claims to know of more than there was to be known: what is newer is no invalidation.
if epoch == '' or newer(epoch, last) then epoch = last end
local present = redis.call('GET', KEYS[1])
local entry = present and head(present)
local why = unstorable(KEYS[2], key, labels, epoch, '1', entry)
if why then return why end
tell_replaced(KEYS[4], ARGV[10], key)
local ttl, stale, err = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local text = compose(epoch, now_ms(), entry, ttl, stale, err, labels, ARGV[8], ARGV[9])
keep_value(KEYS[1], KEYS[3], ARGV[11], key, text, ttl + stale + err, ARGV[7])
return 'stored'
