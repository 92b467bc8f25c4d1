-- clear: forget an ended flight and retire its fill, after every waiter was told.
-- KEYS  1 fills (or refreshes), 2 waiters:K:T, 3 outcome:K:T
-- ARGV  1 group, 2 consumer, 3 fill id
-- Returns 1 cleared, 0 lost (the worker that reclaimed the fill will tell the waiters again and clear).
-- Closes: a paused worker clearing what another is still delivering.
if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
