-- invalidate: append to the log and mark every tag with the new id.
-- KEYS  1 invalidations, 2 tags
-- ARGV  1 who (and, after a line end, why), 2 log limit, then tags; `prefix:P` stands for every tag that begins with P
-- Returns the id: entries and flights whose epoch is older no longer count for these tags.
-- Closes: log and markers move together, so a reader of either knows of the same invalidations.
local who, why = string.match(ARGV[1], '^([^\n]*)\n?(.*)$')
local said = { 'by', who, 'tags', table.concat(ARGV, '\n', 3) }
if why ~= '' then said[5], said[6] = 'reason', why end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(said))
for i = 3, #ARGV do
  local prefix = string.match(ARGV[i], '^prefix:(.+)$')
  if prefix then
    local kept = { id .. ' ' .. prefix }
    for line in string.gmatch(redis.call('HGET', KEYS[2], '#prefixes') or '', '[^\n]+') do
      if string.match(line, '^%S+ (.+)$') ~= prefix then kept[#kept + 1] = line end
    end
    redis.call('HSET', KEYS[2], '#prefixes', table.concat(kept, '\n'))
  else
    redis.call('HSET', KEYS[2], ARGV[i], id)
  end
end
redis.call('HSET', KEYS[2], '#last', id)
return id
