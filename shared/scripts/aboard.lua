-- aboard: the tokens of the flights that a stream's messages stand for, one page of it.
-- KEYS  1 fills (or refreshes)
-- ARGV  1 from (an id, or '(' and an id), 2 most messages
-- Returns {messages read, id of the last one ('' = none), then tokens}.
-- Closes: nothing; it keeps the bodies of the messages where they are.
local found = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local out = { #found, #found > 0 and found[#found][1] or '' }
for _, message in ipairs(found) do
  local fields = message[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'token' then out[#out + 1] = fields[i + 1] end
  end
end
return out
