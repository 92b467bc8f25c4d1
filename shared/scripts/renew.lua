-- renew: extend the leases of the fills a worker is computing.
-- KEYS  1 fills (or refreshes), then per fill: flight:K, waiters:K:T
-- ARGV  1 group, 2 consumer, 3 keep for (ms), then per fill: fill id, T
-- Returns per fill 1 renewed, 0 lost.
-- Closes: an unchecked XCLAIM would steal back what another worker reclaimed. JUSTID: a renewal is not a delivery.
local until_ms = now_ms() + tonumber(ARGV[3])
local out = {}
for i = 4, #ARGV, 2 do
  local id, token = ARGV[i], ARGV[i + 1]
  local flight, waiters = KEYS[i - 2], KEYS[i - 1]
  if owns(KEYS[1], ARGV[1], ARGV[2], id) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
    if redis.call('HGET', flight, 'token') == token then keep_until(flight, until_ms) end
    keep_until(waiters, until_ms)
    out[#out + 1] = 1
  else
    out[#out + 1] = 0
  end
end
return out
