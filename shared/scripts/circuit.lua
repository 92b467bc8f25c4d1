-- circuit: ask a provider's circuit whether a call may be made, or tell it what came of one.
-- KEYS  1 the circuit (hash: `failures` in a row; once open: `until` (ms), the `probe` under way and its `lease` (ms))
-- ARGV  1 'look', 'ask', 'well', 'ill' or 'void' (the call was given up), 2 a name for the call, 3 failures that open,
--       4 open for (ms), 5 most that a probe takes (ms)
-- Returns 0 closed, 1 the call is (or would be) the probe, 2 closed after failures, -MS refused, to be asked again in MS.
-- Closes: with reads and writes apart, a whole pool would probe at once, and calls that began before the circuit opened
-- would decide about it when they end: only its probe does. A prober that dies loses its turn to the next.
local verb, call, now = ARGV[1], ARGV[2], now_ms()
local open = redis.call('HMGET', KEYS[1], 'until', 'probe', 'lease')
local until_ms, mine = tonumber(open[1] or nil), open[2] == call
local keep = math.max(60000, 10 * tonumber(ARGV[4])) + tonumber(ARGV[5])

if verb == 'look' or verb == 'ask' then
  if not until_ms then return redis.call('EXISTS', KEYS[1]) * 2 end
  local free = math.max(until_ms, tonumber(open[3] or 0))
  if now < free then return -(free - now) end
  if verb == 'ask' then
    redis.call('HSET', KEYS[1], 'probe', call, 'lease', now + tonumber(ARGV[5]))
    redis.call('PEXPIRE', KEYS[1], keep)
  end
  return 1
end

if verb == 'void' then
  if until_ms and mine then redis.call('HDEL', KEYS[1], 'probe', 'lease') end
elseif verb == 'well' then
  if mine or not until_ms then redis.call('DEL', KEYS[1]) end
elseif until_ms then
  if mine then
    redis.call('HDEL', KEYS[1], 'probe', 'lease')
    redis.call('HSET', KEYS[1], 'until', now + tonumber(ARGV[4]))
    redis.call('PEXPIRE', KEYS[1], keep)
  end
else
  if redis.call('HINCRBY', KEYS[1], 'failures', 1) >= tonumber(ARGV[3]) then
    redis.call('HSET', KEYS[1], 'until', now + tonumber(ARGV[4]))
  end
  redis.call('PEXPIRE', KEYS[1], keep)
end
return 0
