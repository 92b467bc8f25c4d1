-- hold: extend the leases of messages this consumer is handling.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, then message ids in ascending order
-- Returns how many it still held.
-- Closes: an unchecked XCLAIM would steal back what another worker reclaimed. JUSTID: a renewal is not a delivery.
local mine = owned(KEYS[1], ARGV[1], ARGV[2], { unpack(ARGV, 3) })
if #mine == 0 then return 0 end
local command = { 'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0 }
for _, id in ipairs(mine) do command[#command + 1] = id end
command[#command + 1] = 'JUSTID'
redis.call(unpack(command))
return #mine
