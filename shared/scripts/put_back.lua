-- put_back: give up messages taken over and not delivered: whoever looks next takes them, without waiting for a lease.
-- KEYS  1 stream
-- ARGV  1 group, 2 consumer, 3 who holds them meanwhile (a consumer that never reads), 4 lease (ms), then message ids
-- Returns how many were put back.
-- Closes: a worker that paused after taking them over must not take them from who has them since.
local count = 0
for i = 5, #ARGV do
  if owns(KEYS[1], ARGV[1], ARGV[2], ARGV[i]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[i], 'IDLE', ARGV[4], 'JUSTID')
    count = count + 1
  end
end
return count
