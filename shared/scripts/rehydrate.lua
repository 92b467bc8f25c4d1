-- rehydrate: write answers that PostgreSQL kept back into L2, if they may still be served.
-- KEYS  1 tags, then one entry per answer
-- ARGV  1 the fence, as it was before PostgreSQL was asked, then per answer: K, entry, most life in Redis (ms), labels the
--       request brings (newline-joined)
-- Returns per answer: 1 it may be served (and lies in L2), 0 it may not; or, where L2 holds a newer one, that entry if it may.
-- Closes: a row read before an invalidation and written after it (the markers are asked in the step that writes); one
-- read before its markers were pruned (the fence has moved); one whose epoch belongs to another life of the log, so that
-- nothing can be said of it; a newer answer overwritten by an older one, or the older one served, and kept in an L1,
-- after the newer one was stored.
local fence = redis.call('HGET', KEYS[1], '#fence') or '0'
local last = redis.call('HGET', KEYS[1], '#last')
local now, out = now_ms(), {}
for i = 2, #KEYS do
  local at = 4 * (i - 2) + 2
  local key, text, life, asked = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3]
  local entry = head(text)
  local known = last and entry and not newer(entry.epoch, last) -- a flight that began before the log was: 0-0
  if fence ~= ARGV[1] or not known or entry.gone <= now
      or invalidated(KEYS[1], key, entry.labels, entry.epoch) then
    out[i - 1] = 0
  else
    local present = redis.call('GET', KEYS[i])
    local other = present and head(present)
    local newest = other and (newer(other.epoch, entry.epoch)
      or (entry.epoch == other.epoch and other.created > entry.created))
    if newest then
      entry = not invalidated(KEYS[1], key, other.labels, other.epoch) and other
    elseif not other or newer(entry.epoch, other.epoch) or entry.created > other.created then
      redis.call('SET', KEYS[i], text, 'PX', math.max(1, math.min(life, entry.gone - now)))
    end
    out[i - 1] = entry and fit_for(KEYS[1], key, lines(asked), entry) and (newest and present or 1) or 0
  end
end
return out
