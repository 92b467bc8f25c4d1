-- resume: what is left to do for a fill that was reclaimed, or waited long.
-- KEYS  1 fills (or refreshes), 2 flight:K, 3 waiters:K:T, 4 outcome:K:T
-- ARGV  1 group, 2 consumer, 3 fill id, 4 T
-- Returns {'LOST'}; {'DONE', now (ms), waiters, outcome}: it had ended, tell the waiters; {'ABANDONED'}: nobody waits and no
-- flight stands for it; {'COMPUTE'}.
-- Closes: a second paid call for an answer that had landed when its worker died.
if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return { 'LOST' } end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
local done = redis.call('GET', KEYS[4])
if done then return { 'DONE', now_ms(), redis.call('LRANGE', KEYS[3], 0, -1), done } end
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[4] and redis.call('EXISTS', KEYS[3]) == 0 then
  return { 'ABANDONED' }
end
return { 'COMPUTE' }
