-- lead_renew: extend the lease of a computation an application leads.
-- KEYS  1 flight:K
-- ARGV  1 T, 2 lease (ms), 3 end of the lease so far (ms, server clock; 0: not known yet)
-- Returns now (ms), from which the new lease counts, or 0: lost.
-- A flight replaced for an invalidation is renewed too while its lease lasts: it answers those who asked before.
-- Closes: one who was frozen past its lease extending the flight of who was elected after it.
local now = now_ms()
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return now
end
return now < tonumber(ARGV[3]) and now or 0
