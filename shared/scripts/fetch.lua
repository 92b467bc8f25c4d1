-- fetch: read L2 entries, strictly coherent with every invalidation acknowledged so far.
-- KEYS  1 tags, then one entry per key
-- ARGV  per key: cache key, the request's own tags (newline-joined)
-- Returns the fence (see rehydrate), then per key: the entry; 0 absent (or unfit for this request's tags); 1 invalidated,
--   deleted; 2 unreadable, deleted.
-- An entry that may only serve when providers fail is absent here.
-- Closes: entry and markers are judged in one step; no invalidation can slip between reading one and the other.
local out, now = { redis.call('HGET', KEYS[1], '#fence') or '0' }, now_ms()
for i = 2, #KEYS do
  local key, asked = ARGV[2 * i - 3], ARGV[2 * i - 2]
  local text = redis.call('GET', KEYS[i])
  local result = 0
  if text then
    local entry = head(text)
    if not entry then
      redis.call('UNLINK', KEYS[i])
      result = 2
    elseif invalidated(KEYS[1], key, entry.labels, entry.epoch) then
      redis.call('UNLINK', KEYS[i])
      result = 1
    elseif entry.expires > now and fit_for(KEYS[1], key, lines(asked), entry) then
      result = text
    end
  end
  out[i] = result
end
return out
