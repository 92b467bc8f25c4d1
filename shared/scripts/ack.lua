-- ack: acknowledge messages this consumer still owns, and leave them in the stream for its other groups.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, then message ids in ascending order
-- Returns how many were acknowledged.
-- Closes: XACK does not ask who owns an entry; a paused worker must not acknowledge what another is handling.
local mine = owned(KEYS[1], ARGV[1], ARGV[2], { unpack(ARGV, 3) })
if #mine == 0 then return 0 end
return redis.call('XACK', KEYS[1], ARGV[1], unpack(mine))
