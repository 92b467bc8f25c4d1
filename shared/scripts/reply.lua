-- reply: send any number of replies to one client in one stream entry.
-- KEYS  1 reply channel
-- ARGV  1 not after (ms, server clock), 2 most unread entries, then pairs: request ids (space-separated), payload
-- Returns 1 sent, 0 nobody listens, -1 too late.
-- Closes: a worker that was paused past its lease still holds replies of work that now belongs to another;
-- the server's own clock refuses them in the same step that would have sent them.
if now_ms() > tonumber(ARGV[1]) then return -1 end
local sent = redis.pcall('XADD', KEYS[1], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
if type(sent) == 'table' and sent.err then
  local passing = string.find(sent.err, 'OOM', 1, true) or string.find(sent.err, 'MISCONF', 1, true)
    or string.find(sent.err, 'READONLY', 1, true) or string.find(sent.err, 'NOREPLICAS', 1, true)
  if passing then return sent end
  return 0 -- no stream, or one that takes no more: no reply channel
end
return sent and 1 or 0
