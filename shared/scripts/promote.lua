-- promote: let entries that were hit live longer in L2; never shorter, never past their end.
-- KEYS  1 tags, then one entry per key
-- ARGV  1 probation (ms) of a profile that is not named here, 2 the others ('profile:NAME MS' lines),
--       then per key: K, when it was hit (ms), weight
-- Returns the fence (see rehydrate), then per key: 2 lives longer, 1 lives long enough, 0 absent (L3 may have it),
--   -1 void: invalidated or past its end.
-- Closes: an entry invalidated between its hit and its promotion is deleted, not kept; a report handled twice, or late, says
-- the same moment again, because it counts from the hit and not from now.
local MOST_HEAD = 4096
local default, probations = tonumber(ARGV[1]), {}
for _, line in ipairs(lines(ARGV[2])) do
  local label, ms = string.match(line, '^(.+) (%d+)$')
  probations[label] = tonumber(ms)
end

local now, out = now_ms(), { redis.call('HGET', KEYS[1], '#fence') or '0' }
for i = 2, #KEYS do
  local key, at, weight = ARGV[3 * i - 3], tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1])
  local start = redis.call('GETRANGE', KEYS[i], 0, MOST_HEAD - 1)
  local entry = head(start)
  if not entry and #start == MOST_HEAD then entry = head(redis.call('GET', KEYS[i])) end -- many tags
  if not entry then
    if start ~= '' then redis.call('UNLINK', KEYS[i]) end -- unreadable: a miss, like any other
    out[i] = 0
  elseif entry.gone <= now then
    out[i] = -1
  elseif invalidated(KEYS[1], key, entry.labels, entry.epoch) then
    redis.call('UNLINK', KEYS[i])
    out[i] = -1
  else
    local probation = default
    for _, label in ipairs(entry.labels) do probation = probations[label] or probation end
    local last = math.min(entry.gone, at + weight * (probation + math.max(0, at - entry.created)))
    out[i] = 1 + redis.call('PEXPIREAT', KEYS[i], string.format('%.0f', last), 'GT')
  end
end
return out
