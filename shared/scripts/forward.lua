-- forward: hand a misrouted request over to the partition its key belongs to.
-- KEYS  1 requests of that partition
-- ARGV  1 not after (ms, server clock), then the message's fields and values
-- Returns 1 handed over, -1 too late.
-- Closes: ownership lies in another partition, which no script may touch together with this one; the server's clock
-- refuses a worker that was paused past its lease.
if now_ms() > tonumber(ARGV[1]) then return -1 end
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
return 1
