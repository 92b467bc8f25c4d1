-- dismiss: remove a consumer from a group, only if nothing is pending for it.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer
-- Returns 1 removed, 0 kept.
-- Closes: XGROUP DELCONSUMER deletes the consumer's pending entries with it, losing them for good.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if pending.err or #pending > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
