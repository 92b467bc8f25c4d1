-- orphan: end a flight whose fill is gone, so that the next request begins anew; say who waited.
-- KEYS  1 flight:K, 2 waiters:K:T, 3 outcome:K:T
-- ARGV  1 T, a token no fill carries any more
-- Returns {flights removed (0|1), waiters}; the waiters stay until they were told and trimmed.
-- Closes: between the audit's look and this step the flight may have ended in order (its outcome stands, or all is gone),
-- been replaced (another token) or be led by an application (it never had a fill). A token's fill never comes back.
local token = ARGV[1]
if redis.call('EXISTS', KEYS[3]) == 1 then return { 0, {} } end
local flight = redis.call('HMGET', KEYS[1], 'token', 'lead')
local removed = 0
if flight[1] == token then
  if flight[2] then return { 0, {} } end
  removed = redis.call('DEL', KEYS[1])
end
return { removed, redis.call('LRANGE', KEYS[2], 0, -1) }
