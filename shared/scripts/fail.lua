-- fail: end a flight that has no answer; who waits gets an entry kept for that case, else the flight's own error.
-- KEYS  1 fills (or refreshes), 2 flight:K, 3 waiters:K:T, 4 outcome:K:T, 5 entry:K, 6 tags, 7 failed:K, 8 landed
-- ARGV  1 group, 2 consumer, 3 fill id, 4 T, 5 error JSON, 6 keep the outcome for (ms), 7 K, 8 answer later requests with this
--       error for (ms; 0 not at all; doubled with each failure in a row), 9 the error's code, 10 call JSON ('' = none was made),
--       11 most answers waiting for PostgreSQL
-- Returns {'LOST'}, {'DONE', now (ms), waiters, outcome} when it had ended already, or {'FAILED', now (ms), waiters, outcome}.
--   The outcome is 'failed\n' error JSON, or 'stale\n' error JSON '\n' entry.
-- Closes: a paused worker's late error over another's answer (ownership); an error is never stored as an entry, and a
-- flight that replaced this one is left alone (token); an entry invalidated while the provider failed (entry and markers
-- are judged in the step that ends the flight, and whoever takes over after a crash tells the same).
local LONGEST = 60000
local stream, group, consumer, id = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if not owns(stream, group, consumer, id) then return { 'LOST' } end
redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
local done = redis.call('GET', KEYS[4])
if done then return { 'DONE', now_ms(), redis.call('LRANGE', KEYS[3], 0, -1), done } end

local outcome = 'failed\n' .. ARGV[5]
local text = spare(KEYS[5], KEYS[6], ARGV[7], KEYS[2], ARGV[4])
if text then outcome = 'stale\n' .. ARGV[5] .. '\n' .. text end
if redis.call('HGET', KEYS[2], 'token') == ARGV[4] then
  redis.call('DEL', KEYS[2])
  local span = tonumber(ARGV[8])
  if span > 0 then
    local failures = tonumber(string.match(redis.call('GET', KEYS[7]) or '', '^%d+ (%d+)\n') or 0) + 1
    span = math.min(span * 2 ^ math.min(failures - 1, 20), LONGEST)
    -- Remembered for longer than it is answered: the next failure in a row counts on.
    redis.call('SET', KEYS[7], string.format('%d %d\n', now_ms() + span, failures) .. ARGV[5], 'PX', math.ceil(10 * span))
  end
end
if ARGV[10] ~= '' and redis.call('XLEN', KEYS[8]) < tonumber(ARGV[11]) then
  redis.call('XADD', KEYS[8], 'NOMKSTREAM', '*', 'key', ARGV[7], 'outcome', ARGV[9], 'call', ARGV[10])
end
redis.call('SET', KEYS[4], outcome, 'PX', ARGV[6])
return { 'FAILED', now_ms(), redis.call('LRANGE', KEYS[3], 0, -1), outcome }
