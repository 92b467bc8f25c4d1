-- retire: acknowledge and delete messages this consumer still owns.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, then message ids in ascending order
-- Returns how many were retired.
-- Closes: XACK does not ask who owns an entry; a paused worker must not acknowledge what another is handling.
local mine = owned(KEYS[1], ARGV[1], ARGV[2], { unpack(ARGV, 3) })
if #mine == 0 then return 0 end
redis.call('XACK', KEYS[1], ARGV[1], unpack(mine))
redis.call('XDEL', KEYS[1], unpack(mine))
return #mine
