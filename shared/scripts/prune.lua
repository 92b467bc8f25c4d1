-- prune: raise a partition's horizon, or remove markers that void nothing any more. workers/prune.py has the order.
-- KEYS  1 tags
-- ARGV  1 'begin', 2 horizon (an invalidation's id);
--   or  1 'end', then pairs: label, the id its marker had; `prefix:P` as in the log
-- Returns {now (ms)} of 'begin'; of 'end' how many markers were removed: those that moved stay.
-- Closes: an entry read from PostgreSQL before the void ones left it may come back to Redis only by a script that
-- compares the fence. It rises in the same step in which a marker that might have refused that entry disappears.
local tags = KEYS[1]
redis.call('HINCRBY', tags, '#fence', 1)
if ARGV[1] == 'begin' then
  local horizon = redis.call('HGET', tags, '#pruned')
  if not horizon or newer(ARGV[2], horizon) then redis.call('HSET', tags, '#pruned', ARGV[2]) end
  return { now_ms() }
end

local removed, kept = 0, {}
for line in string.gmatch(redis.call('HGET', tags, '#prefixes') or '', '[^\n]+') do
  local id, prefix = string.match(line, '^(%S+) (.+)$')
  kept[#kept + 1] = { 'prefix:' .. prefix, id, line }
end
local before = #kept
for i = 2, #ARGV, 2 do
  local label, id = ARGV[i], ARGV[i + 1]
  if string.match(label, '^prefix:.') then
    for at = #kept, 1, -1 do
      if kept[at][1] == label and kept[at][2] == id then table.remove(kept, at) end
    end
  elseif redis.call('HGET', tags, label) == id then
    removed = removed + redis.call('HDEL', tags, label)
  end
end
if #kept < before then
  removed = removed + before - #kept
  local left = {}
  for at, one in ipairs(kept) do left[at] = one[3] end
  if #left > 0 then redis.call('HSET', tags, '#prefixes', table.concat(left, '\n')) end
  if #left == 0 then redis.call('HDEL', tags, '#prefixes') end
end
return removed
