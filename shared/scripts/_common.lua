-- Prepended to every script. What they share; it touches no key it is not given.

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

-- Which of the messages `ids` (in ascending order) `consumer` still owns.
local function owned(stream, group, consumer, ids)
  local asked, mine = {}, {}
  for _, id in ipairs(ids) do asked[id] = true end
  local pending = redis.pcall('XPENDING', stream, group, ids[1], ids[#ids], 10000, consumer)
  if pending.err then return mine end
  for _, entry in ipairs(pending) do
    if asked[entry[1]] then mine[#mine + 1] = entry[1] end
  end
  return mine
end

-- Whether any of `labels` (or `all`, or the key's own tag, or a prefix of one) was invalidated after `epoch`.
local function invalidated(tags_key, key, labels, epoch)
  local last = redis.call('HGET', tags_key, '#last')
  if not last or not newer(last, epoch) then return false end
  local wanted = { 'all', 'key:' .. key }
  for _, label in ipairs(labels) do wanted[#wanted + 1] = label end
  for at = 1, #wanted, 1000 do -- unpack has a limit
    local markers = redis.call('HMGET', tags_key, unpack(wanted, at, math.min(at + 999, #wanted)))
    for _, marker in ipairs(markers) do
      if marker and newer(marker, epoch) then return true end
    end
  end
  local prefixes = redis.call('HGET', tags_key, '#prefixes') -- lines 'ID PREFIX', few
  for marker, prefix in string.gmatch(prefixes or '', '(%d+%-%d+) ([^\n]+)') do
    if newer(marker, epoch) then
      for _, label in ipairs(labels) do
        if string.sub(label, 1, #prefix) == prefix then return true end
      end
    end
  end
  return false
end

-- Whether markers newer than `epoch` have been pruned: what began then, and is not stored yet, can no longer be judged.
local function pruned(tags_key, epoch)
  local horizon = redis.call('HGET', tags_key, '#pruned')
  return horizon and newer(horizon, epoch)
end

-- Split a newline-joined list; '' is the empty list.
local function lines(text)
  local out = {}
  for line in string.gmatch(text, '[^\n]+') do out[#out + 1] = line end
  return out
end

-- Read an entry's head; nil when it is not an entry of this version. Times in ms: fresh until `fresh`, served until
-- `expires`, kept until `gone`.
-- Layout: 'mp2 EPOCH CREATED TTL STALE ERROR TAGS\n' tag\n… meta-JSON\n body
local function head(text)
  local epoch, created, ttl, stale, err, count, at =
    string.match(text, '^mp2 (%d+%-%d+) (%d+) (%d+) (%d+) (%d+) (%d+)\n()')
  if not epoch then return nil end
  local labels = {}
  for i = 1, tonumber(count) do
    local stop = string.find(text, '\n', at, true)
    if not stop then return nil end
    labels[i] = string.sub(text, at, stop - 1)
    at = stop + 1
  end
  local fresh = tonumber(created) + tonumber(ttl)
  local expires = fresh + tonumber(stale)
  return {
    epoch = epoch, created = tonumber(created), fresh = fresh, expires = expires, gone = expires + tonumber(err),
    labels = labels,
  }
end

-- Whether an entry that is valid by its own labels may answer a request that brings `asked`, labels of its own. Those the
-- entry does not carry were not watched for it: once their markers may have been pruned, nobody can tell.
local function fit_for(tags_key, key, asked, entry)
  local carried, foreign = {}, {}
  for _, label in ipairs(entry.labels) do carried[label] = true end
  for _, label in ipairs(asked) do
    if not carried[label] then foreign[#foreign + 1] = label end
  end
  if #foreign == 0 then return true end
  return not pruned(tags_key, entry.epoch) and not invalidated(tags_key, key, foreign, entry.epoch)
end

-- Compose an entry; `meta` is its JSON. It was created later than the one whose place it takes (`other`; nil: none), were it
-- stored in the same millisecond or before the clock was set back: PostgreSQL tells the newer of one epoch by that.
local function compose(epoch, now, other, ttl, stale, err, labels, meta, body)
  local created = other and math.max(now, other.created + 1) or now
  return string.format('mp2 %s %d %d %d %d %d\n', epoch, created, ttl, stale, err, #labels)
    .. table.concat(labels, '\n') .. (#labels > 0 and '\n' or '') .. meta .. '\n' .. body
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The error JSON that a failed key still answers with; nil once its time is up. 'UNTIL_MS FAILURES\n' error-JSON
local function failed_until(failed_key)
  local text = redis.call('GET', failed_key)
  local until_ms, at = string.match(text or '', '^(%d+) %d+\n()')
  if until_ms and tonumber(until_ms) > now_ms() then return string.sub(text, at) end
  return nil
end

-- The entry that those aboard the flight `token` may have for want of its answer; nil when there is none. Whose labels are no
-- longer known (the flight was replaced, or has too many) gets none.
local function spare(entry_key, tags_key, key, flight_key, token)
  local text = redis.call('GET', entry_key)
  local entry = text and head(text)
  if not entry then return nil end
  if entry.gone <= now_ms() then return nil end
  local flight = redis.call('HMGET', flight_key, 'token', 'tags', 'store')
  if flight[1] ~= token or flight[3] == 'many-tags' then return nil end
  if invalidated(tags_key, key, entry.labels, entry.epoch) then return nil end
  return fit_for(tags_key, key, lines(flight[2]), entry) and text or nil
end

-- Why what was computed since `epoch` may not take the place of `entry` (nil: none); nil if it may. `store` is its flight's.
local function unstorable(tags_key, key, labels, epoch, store, entry)
  if store ~= '1' then return (not store or store == '0') and 'no-store' or store end
  if pruned(tags_key, epoch) or invalidated(tags_key, key, labels, epoch) then return 'invalidated' end
  return entry and newer(entry.epoch, epoch) and 'superseded' or nil
end

-- Tell whoever holds the replaced answer of `key` in L1: they follow this log and drop it; it may have left L2 before. No
-- marker moves: nothing is invalidated.
local function tell_replaced(log, limit, key)
  redis.call('XADD', log, 'MAXLEN', '~', limit, '*', 'by', 'land', 'tags', 'key:' .. key)
end

-- Store a value an application computed, for `life` ms. Only what is on its way to the durable tier may leave Redis early,
-- after its probation, and not while much is. (How long it has been, an application may not look: others' prompts lie there.)
local function keep_value(entry_key, landed, most_waiting, key, text, life, probation)
  local waiting = redis.call('XLEN', landed)
  local told = waiting < tonumber(most_waiting)
    and redis.call('XADD', landed, 'NOMKSTREAM', '*', 'key', key, 'outcome', 'stored', 'entry', text)
  redis.call('SET', entry_key, text, 'PX', told and waiting < 1000 and math.min(life, tonumber(probation)) or life)
end

-- Let `key` live at least until `at_ms`; never shorten its life.
local function keep_until(key, at_ms)
  if redis.call('PTTL', key) == -1 then
    redis.call('PEXPIREAT', key, at_ms)
  else
    redis.call('PEXPIREAT', key, at_ms, 'GT')
  end
end
