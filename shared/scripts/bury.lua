-- bury: move one message to the dead letters.
-- KEYS  1 stream, 2 dead
-- ARGV  1 group, 2 consumer, 3 message id, 4 reason, 5 deliveries, 6 most dead letters
-- Returns 1 buried, 0 lost.
-- Closes: the message leaves its stream and appears among the dead in one step, by its owner only.
if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local found = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])
local letter = { 'reason', ARGV[4], 'stream', KEYS[1], 'id', ARGV[3], 'deliveries', ARGV[5] }
if found[1] then
  local fields = found[1][2]
  for i = 1, math.min(#fields, 2000), 2 do -- unpack has a limit, and nothing of ours has more fields
    letter[#letter + 1] = 'm:' .. fields[i]
    letter[#letter + 1] = fields[i + 1]
  end
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', unpack(letter))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
