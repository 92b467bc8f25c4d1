-- revalidate: have answers computed that nobody waits for: refreshed before they expire, or warmed.
-- KEYS  1 refreshes, 2 tags, then per answer: entry:K, flight:K, failed:K
-- ARGV  1 most refreshes waiting, 2 keep a flight for (ms), then per answer: K, token, body, spec, tags (newline-joined), ttl (ms),
--       the youngest `created` that is too old ('' = only if there is no entry at all)
-- Returns per answer: 1 begun, 0 not needed (a newer entry), 2 under way already, 3 backing off after an error, 4 no room.
-- Closes: one refresh per key across all workers; a refresh of what another worker has refreshed meanwhile.
local most, until_ms = tonumber(ARGV[1]), now_ms() + tonumber(ARGV[2])
local waiting, out = redis.call('XLEN', KEYS[1]), {}
for i = 3, #KEYS, 3 do
  local at = 7 * (i - 3) / 3 + 3
  local key, token, labels, too_old = ARGV[at], ARGV[at + 1], lines(ARGV[at + 4]), ARGV[at + 6]
  local text = redis.call('GET', KEYS[i])
  local entry = text and head(text)
  local valid = entry and entry.expires > now_ms()
    and not invalidated(KEYS[2], key, entry.labels, entry.epoch) and fit_for(KEYS[2], key, labels, entry)
  local flight = redis.call('HMGET', KEYS[i + 1], 'epoch', 'tags')
  local flies = flight[1] and not pruned(KEYS[2], flight[1])
    and not invalidated(KEYS[2], key, lines(flight[2]), flight[1])
    and not invalidated(KEYS[2], key, labels, flight[1])
  if valid and (too_old == '' or entry.created > tonumber(too_old)) then
    out[#out + 1] = 0
  elseif flies then
    out[#out + 1] = 2
  elseif failed_until(KEYS[i + 2]) then
    out[#out + 1] = 3
  elseif waiting >= most then
    out[#out + 1] = 4
  else
    local epoch = redis.call('HGET', KEYS[2], '#last') or '0-0'
    local id = redis.call('XADD', KEYS[1], '*', 'key', key, 'token', token, 'epoch', epoch, 'body', ARGV[at + 2],
      'spec', ARGV[at + 3])
    redis.call('DEL', KEYS[i + 1])
    redis.call('HSET', KEYS[i + 1], 'token', token, 'epoch', epoch, 'tags', ARGV[at + 4], 'ttl', ARGV[at + 5],
      'store', '1', 'refresh', id)
    if too_old ~= '' then redis.call('HSET', KEYS[i + 1], 'replaces', '1') end
    redis.call('PEXPIREAT', KEYS[i + 1], until_ms)
    waiting = waiting + 1
    out[#out + 1] = 1
  end
end
return out
