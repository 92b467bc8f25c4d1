-- publish: accept requests while the stream is below its limit; never trim what was accepted.
-- KEYS  1 requests
-- ARGV  1 limit, then per request: id, reply channel, deadline (ms, server clock), body, cache directives ('' = none)
-- Returns the number accepted, counted from the first.
-- Closes: length check and append as one step, so that concurrent producers cannot overshoot the limit.
local room = tonumber(ARGV[1]) - redis.call('XLEN', KEYS[1])
local accepted = 0
for i = 2, #ARGV, 5 do
  if accepted >= room then break end
  if ARGV[i + 4] == '' then
    redis.call('XADD', KEYS[1], '*', 'id', ARGV[i], 'reply', ARGV[i + 1], 'deadline', ARGV[i + 2], 'body', ARGV[i + 3])
  else
    redis.call('XADD', KEYS[1], '*', 'id', ARGV[i], 'reply', ARGV[i + 1], 'deadline', ARGV[i + 2], 'body', ARGV[i + 3],
      'cache', ARGV[i + 4])
  end
  accepted = accepted + 1
end
return accepted
