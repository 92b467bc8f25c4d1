-- lead_renew: extend the lease of a computation an application leads.
-- KEYS  1 flight:K
-- ARGV  1 T, 2 lease (ms)
-- Returns 1 renewed, 0 lost.
-- Closes: one who was frozen past its lease extending the flight of who was elected after it.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
