-- hand_back: make everything a leaving consumer still owns reclaimable at once.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, 3 who holds it meanwhile (a consumer that never reads), 4 lease (ms)
-- Returns how many were handed back.
-- Closes: without it, unfinished work of a worker that was stopped in order waits for a whole lease.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 10000, ARGV[2])
if pending.err then return 0 end
for _, entry in ipairs(pending) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, entry[1], 'IDLE', ARGV[4],
    'RETRYCOUNT', math.max(0, entry[4] - 1), 'JUSTID') -- leaving in order is no failed delivery
end
return #pending
