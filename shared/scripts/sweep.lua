-- sweep: delete the entries that the markers void; or find those that an inquiry names, and delete nothing.
-- KEYS  1 tags, then entries
-- ARGV  1 'delete' | 'find', 2 labels of the inquiry (newline-joined; `all`, `key:K`, `prefix:P` as everywhere)
-- Returns a flat list, per hit: its place among the entries (from 1), epoch, labels (newline-joined).
-- Closes: an entry may be replaced between the scan that names it and its deletion; it is judged as it lies, in one step
-- with the markers. Only heads are read.
local HEAD = 1024
local find, asked, prefixes = ARGV[1] == 'find', {}, {}
for _, label in ipairs(lines(ARGV[2])) do
  local prefix = string.match(label, '^prefix:(.+)$')
  if prefix then prefixes[#prefixes + 1] = prefix else asked[label] = true end
end

local function named(key, labels)
  if asked['all'] or asked['key:' .. key] then return true end
  for _, label in ipairs(labels) do
    if asked[label] then return true end
    for _, prefix in ipairs(prefixes) do
      if string.sub(label, 1, #prefix) == prefix then return true end
    end
  end
  return false
end

local hits, last = {}, redis.call('HGET', KEYS[1], '#last')
for i = 2, #KEYS do
  local text = redis.call('GETRANGE', KEYS[i], 0, HEAD - 1)
  local entry = head(text)
  if not entry and #text == HEAD then entry = head(redis.call('GET', KEYS[i])) end
  if entry then
    local key = string.match(KEYS[i], '([^:]+)$')
    local void = last and newer(last, entry.epoch) and invalidated(KEYS[1], key, entry.labels, entry.epoch)
    if void and not find then redis.call('UNLINK', KEYS[i]) end
    if find and not void and named(key, entry.labels) or void and not find then
      hits[#hits + 1] = i - 1
      hits[#hits + 1] = entry.epoch
      hits[#hits + 1] = table.concat(entry.labels, '\n')
    end
  end
end
return hits
