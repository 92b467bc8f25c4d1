-- redeliver: read messages this consumer owns already, counting it as a delivery or not.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, 3 count it (1|0), then message ids
-- Returns {now (ms), the messages still there and still owned: {id, fields, deliveries so far}}.
-- Closes: a bare XCLAIM would take back what another consumer reclaimed meanwhile.
local now, out = now_ms(), {}
for i = 4, #ARGV do
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if not pending.err and #pending > 0 then
    local deliveries = pending[1][4]
    if ARGV[3] == '1' then
      redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i])
      deliveries = deliveries + 1
    else
      redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    end
    local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
    if found[1] then
      out[#out + 1] = { ARGV[i], found[1][2], deliveries }
    else
      redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) -- deleted by hand: nothing is left to deliver
    end
  end
end
return { now, out }
