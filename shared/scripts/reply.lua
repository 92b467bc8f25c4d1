-- reply: send any number of replies to one client in one stream entry.
-- KEYS  1 reply channel
-- ARGV  1 not after (ms, server clock), 2 most unread entries, then pairs: request ids (space-separated), payload
-- Returns 1 sent, 0 nobody listens, -1 too late.
-- Closes: a worker that was paused past its lease still holds replies of work that now belongs to another;
-- the server's own clock refuses them in the same step that would have sent them.
if now_ms() > tonumber(ARGV[1]) then return -1 end
local sent = redis.pcall('XADD', KEYS[1], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
if type(sent) == 'table' and sent.err then
  if string.find(sent.err, 'WRONGTYPE', 1, true) then return 0 end -- no stream: no reply channel
  return sent
end
return sent and 1 or 0
