-- ack: acknowledge messages this consumer still owns, and leave them in the stream for its other groups.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, then message ids in ascending order
-- Returns how many were acknowledged.
-- Closes: XACK does not ask who owns an entry; a paused worker must not acknowledge what another is handling.
local asked = {}
for i = 3, #ARGV do asked[ARGV[i]] = true end
local mine = {}
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[#ARGV], 10000, ARGV[2])
if pending.err then return 0 end
for _, entry in ipairs(pending) do
  if asked[entry[1]] then mine[#mine + 1] = entry[1] end
end
if #mine == 0 then return 0 end
return redis.call('XACK', KEYS[1], ARGV[1], unpack(mine))
