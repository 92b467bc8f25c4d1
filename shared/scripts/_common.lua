-- Prepended to every script. Pure helpers; touches no key of its own.

-- Whether stream id a is newer than stream id b.
local function newer(a, b)
  if a == b then return false end
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  a_ms, b_ms = tonumber(a_ms), tonumber(b_ms)
  if a_ms ~= b_ms then return a_ms > b_ms end
  return tonumber(a_seq) > tonumber(b_seq)
end

-- Whether `consumer` still owns the pending entry `id`. XACK does not ask; every write of ours does.
-- A vanished stream or group owns nothing.
local function owns(stream, group, consumer, id)
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1, consumer)
  return pending.err == nil and #pending > 0
end

-- Whether any of `labels` (or `all`, the pruning floor, or the key's own tag) was invalidated after `epoch`.
local function invalidated(tags_key, key, labels, epoch)
  local last = redis.call('HGET', tags_key, '#last')
  if not last or not newer(last, epoch) then return false end
  local wanted = { 'all', '#floor', 'key:' .. key }
  for _, label in ipairs(labels) do wanted[#wanted + 1] = label end
  for at = 1, #wanted, 1000 do -- unpack has a limit
    local markers = redis.call('HMGET', tags_key, unpack(wanted, at, math.min(at + 999, #wanted)))
    for _, marker in ipairs(markers) do
      if marker and newer(marker, epoch) then return true end
    end
  end
  return false
end

-- Split a newline-joined list; '' is the empty list.
local function lines(text)
  local out = {}
  for line in string.gmatch(text, '[^\n]+') do out[#out + 1] = line end
  return out
end

-- Read an entry's head; nil when it is not an entry of this version.
-- Layout: 'mp1 EPOCH CREATED_MS EXPIRES_MS TAGS\n' tag\n… meta-JSON\n body
local function head(text)
  local epoch, created, expires, count, at =
    string.match(text, '^mp1 (%d+%-%d+) (%d+) (%d+) (%d+)\n()')
  if not epoch then return nil end
  local labels = {}
  for i = 1, tonumber(count) do
    local stop = string.find(text, '\n', at, true)
    if not stop then return nil end
    labels[i] = string.sub(text, at, stop - 1)
    at = stop + 1
  end
  return { epoch = epoch, created = tonumber(created), expires = tonumber(expires), labels = labels }
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Let `key` live at least until `at_ms`; never shorten its life.
local function keep_until(key, at_ms)
  if redis.call('PTTL', key) == -1 then
    redis.call('PEXPIREAT', key, at_ms)
  else
    redis.call('PEXPIREAT', key, at_ms, 'GT')
  end
end
