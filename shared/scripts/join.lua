-- join: put requests for one key aboard a flight, beginning one if none is fit; acknowledge them.
-- KEYS  1 requests, 2 fills, 3 entry:K, 4 flight:K, 5 tags, 6 waiters:K: (prefix; the token in force completes it),
--       7 failed:K, 8 refreshes
-- ARGV  1 group, 2 consumer, 3 K, 4 token for a new flight, 5 mode, 6 oldest acceptable entry (ms; 0 any),
--       7 ttl (ms), 8 store (1|0), 9 keep until (ms), 10 most fills, 11 body, 12 spec, 13 tags (newline-joined),
--       14 lease (ms) of a flight that one of the requests' own applications computes (0: the LLM pool does),
--       15 group of the LLM pool, then pairs: message id, waiter ('CLIENT REQUEST [EXPERIMENT [VARIANT]]'; '' =
--       nobody waits)
-- Returns {'HIT', entry}, {'STALE', entry} or {'FAILED', error JSON} (nothing acknowledged: the provider has just failed, and
-- there is an entry kept for that case, or none), {'BEGUN'|'JOINED', token, n}, {'FULL'}, {'LOST'}, or
-- {'LEAD', token, n, who computes, epoch, tags, ttl (ms)}.
-- Closes: between a worker's look at L2 and its join a flight may have landed (the entry is checked again) or begun
-- (joined); two workers can never both begin one. A flight older than an invalidation of the request's tags is not
-- joined but replaced: it keeps its own waiters, who asked before. Messages this consumer no longer owns are left alone.
local MOST_TAGS = 512
local group, consumer, key, token, mode = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local labels, lease = lines(ARGV[13]), tonumber(ARGV[14])

local ids, asking = {}, {}
for i = 16, #ARGV, 2 do
  if owns(KEYS[1], group, consumer, ARGV[i]) then
    ids[#ids + 1] = ARGV[i]
    asking[#asking + 1] = ARGV[i + 1]
  end
end
if #ids == 0 then return { 'LOST' } end

local kept
if mode == 'default' or mode == 'no-store' then
  local text = redis.call('GET', KEYS[3])
  local entry = text and head(text)
  if entry and entry.created >= tonumber(ARGV[6])
      and not invalidated(KEYS[5], key, entry.labels, entry.epoch) and fit_for(KEYS[5], key, labels, entry) then
    if (lease > 0 and entry.fresh or entry.expires) > now_ms() then return { 'HIT', text } end
    kept = text
  end
end

local status, leader, flight
local shared = mode ~= 'bypass'
if shared then
  flight = redis.call('HMGET', KEYS[4], 'token', 'epoch', 'tags', 'ttl', 'store', 'lead', 'refresh')
  -- One with too many tags does not know them all: whatever was invalidated since may have been one of them.
  local last = flight[5] == 'many-tags' and redis.call('HGET', KEYS[5], '#last')
  if last and newer(last, flight[2]) then flight = {} end
  if flight[1] then
    local all, known = lines(flight[3]), {}
    for _, label in ipairs(all) do known[label] = true end
    local before = #all
    for _, label in ipairs(labels) do
      if not known[label] then all[#all + 1] = label end
    end
    if not pruned(KEYS[5], flight[2]) and not invalidated(KEYS[5], key, all, flight[2]) then
      status, token, leader = 'JOINED', flight[1], flight[6]
      if #all > MOST_TAGS then
        -- An entry must carry the tags of all who joined. Too many: it answers them and is not stored.
        redis.call('HSET', KEYS[4], 'store', 'many-tags')
      else
        if #all > before then redis.call('HSET', KEYS[4], 'tags', table.concat(all, '\n')) end
        if ARGV[8] == '1' and flight[5] == '0' then redis.call('HSET', KEYS[4], 'store', '1') end
      end
      if tonumber(ARGV[7]) < tonumber(flight[4]) then redis.call('HSET', KEYS[4], 'ttl', ARGV[7]) end
    end
  end
elseif redis.call('EXISTS', KEYS[6] .. token) == 1 then
  status = 'JOINED' -- the same bypass request, published twice
end

local moved = false
if status and flight and flight[7] then
  -- A refresh that nobody has taken up yet now has somebody who waits for it: it goes to the fills.
  local found = redis.call('XRANGE', KEYS[8], flight[7], flight[7])
  local taken = redis.pcall('XPENDING', KEYS[8], ARGV[15], flight[7], flight[7], 1)
  if found[1] and (taken.err or #taken == 0) then
    redis.call('XDEL', KEYS[8], flight[7])
    redis.call('XADD', KEYS[2], '*', unpack(found[1][2]))
    moved = true
  end
  redis.call('HDEL', KEYS[4], 'refresh')
end

if not status then
  local failure = (mode == 'default' or mode == 'no-store') and lease == 0 and failed_until(KEYS[7])
  if failure then return kept and { 'STALE', kept } or { 'FAILED', failure } end
  if lease == 0 and redis.call('XLEN', KEYS[2]) >= tonumber(ARGV[10]) then return { 'FULL' } end
  local epoch = redis.call('HGET', KEYS[5], '#last') or '0-0'
  if shared then
    redis.call('DEL', KEYS[4])
    redis.call('HSET', KEYS[4], 'token', token, 'epoch', epoch, 'tags', ARGV[13], 'ttl', ARGV[7], 'store', ARGV[8])
  end
  status = 'BEGUN'
  if lease > 0 then
    -- Its leader renews it; left alone it expires, and who knocks next leads a new one.
    leader = asking[1]
    if shared then
      redis.call('HSET', KEYS[4], 'lead', leader)
      redis.call('PEXPIRE', KEYS[4], lease)
    end
  else
    redis.call('XADD', KEYS[2], '*', 'key', key, 'token', token, 'epoch', epoch, 'body', ARGV[11], 'spec', ARGV[12])
  end
end

-- Somebody wants another answer than the one there is, which an L1 may hold although L2 has it no more.
if shared and (mode == 'refresh' or tonumber(ARGV[6]) > 0) then redis.call('HSET', KEYS[4], 'replaces', '1') end
if shared and not leader then keep_until(KEYS[4], ARGV[9]) end
local waiters, strict = {}, mode == 'refresh' or ARGV[6] ~= '0'
for i, waiter in ipairs(asking) do
  if leader and waiter == leader then
    status = 'LEAD'
  elseif waiter ~= '' then
    -- A waiter: who; 0 if the flight began for it (or a refresh became one for it) or 1 if it joined, 2 more if it takes no
    -- stored answer should the flight fail; when it was published (ms); what it counts under.
    local who, counted = string.match(waiter, '^(%S+ %S+)(.*)$')
    local how = ((status == 'BEGUN' or moved) and i == 1 and 0 or 1) + (strict and 2 or 0)
    waiters[#waiters + 1] = string.format('%s %d %s%s', who, how, string.match(ids[i], '^%d+'), counted)
  end
end
if #waiters > 0 then
  redis.call('RPUSH', KEYS[6] .. token, unpack(waiters))
  keep_until(KEYS[6] .. token, ARGV[9])
end
redis.call('XACK', KEYS[1], group, unpack(ids))
redis.call('XDEL', KEYS[1], unpack(ids))
if status == 'LEAD' then
  -- Who bypasses the cache computes for itself alone: no flight, and so nothing to land.
  local led = shared and redis.call('HMGET', KEYS[4], 'epoch', 'tags', 'ttl') or { '0-0', ARGV[13], ARGV[7] }
  return { 'LEAD', token, #ids, leader, led[1], led[2], led[3] }
end
return { status, token, #ids }
