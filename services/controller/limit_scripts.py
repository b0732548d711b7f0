"""The Lua that changes API keys and their limits, run by the Redis server one script at a time.

Keys (one hash tag):

    meta      hash   incarnation, revision: of the keys, not of what they spend
    keys      hash   key's hash -> record (JSON, without use and revocation)
    used      hash   key's hash -> tokens spent, or leased where there is a quota
    revoked   set    hashes of keys that are no longer good; they stay, so that the API stays closed
    levels    hash   hash:requests, hash:tokens -> units in the bucket | ms of the server's clock then
    routers   zset   router id -> when it last asked (ms)
    answers:R hash   a call's number -> what router R was answered, until it says that it knows

A bucket holds a minute's units at most and fills all the time.
"""

from __future__ import annotations

KEY_NAMES = ("meta", "keys", "used", "revoked", "levels", "routers")
ROUTER_MS = 60_000  # a router that is silent for so long counts no longer
ANSWERS_MS = 24 * 3_600_000  # of a router that is silent for so long nothing is remembered

_PRELUDE = """
local meta, keys, used, revoked, levels, routers = unpack(KEYS)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local incarnation = redis.call('HGET', meta, 'incarnation')
if not incarnation then
  incarnation = ARGV[1]
  redis.call('DEL', keys, used, revoked, levels, routers)
  redis.call('HSET', meta, 'incarnation', incarnation, 'revision', 0)
end

local function row(hash)
  return {redis.call('HGET', keys, hash), redis.call('HGET', used, hash) or '0', redis.call('SISMEMBER', revoked, hash)}
end
"""

# most keys, then {hash, record, used, revoked} ... -> keys added, or -1: too many
PUT = (
    _PRELUDE
    + """
local added, changed = 0, 0
if redis.call('HLEN', keys) + (#ARGV - 2) / 4 > tonumber(ARGV[2]) then return -1 end
for i = 3, #ARGV, 4 do
  local hash, spent = ARGV[i], tonumber(ARGV[i + 2])
  if redis.call('HSETNX', keys, hash, ARGV[i + 1]) == 1 then added, changed = added + 1, 1 end
  if spent > tonumber(redis.call('HGET', used, hash) or 0) then redis.call('HSET', used, hash, spent) end
  if ARGV[i + 3] == '1' and redis.call('SADD', revoked, hash) == 1 then changed = 1 end
end
if changed == 1 then redis.call('HINCRBY', meta, 'revision', 1) end
return added
"""
)

# incarnation and revision that the caller has -> {incarnation, revision, 1 if those, {record, used, revoked} ...}
LIST = (
    _PRELUDE
    + """
local revision = redis.call('HGET', meta, 'revision')
if ARGV[2] == incarnation and ARGV[3] == revision then return {incarnation, revision, 1} end
local answer = {incarnation, revision, 0}
for _, hash in ipairs(redis.call('HKEYS', keys)) do answer[#answer + 1] = row(hash) end
return answer
"""
)

# how the hash begins -> {how many keys begin so, record, used, revoked}
REVOKE = (
    _PRELUDE
    + """
local found = {}
for _, hash in ipairs(redis.call('HKEYS', keys)) do
  if string.sub(hash, 1, #ARGV[2]) == ARGV[2] then found[#found + 1] = hash end
end
if #found ~= 1 then return {#found} end
if redis.call('SADD', revoked, found[1]) == 1 then redis.call('HINCRBY', meta, 'revision', 1) end
return {1, unpack(row(found[1]))}
"""
)

# router id, number and oldest without an answer, then
# {hash, need, want and give back of requests, of tokens, of quota, spent} ...
# -> {routers, {hash, granted, left and wait ms of each} ...}, without keys that are not there or revoked
LEASE = (
    _PRELUDE
    + f"""
local answers, number, oldest = KEYS[7], ARGV[3], tonumber(ARGV[4])
if number ~= '0' then
  local before = redis.call('HGET', answers, number)
  if before then return cmsgpack.unpack(before) end
  for _, each in ipairs(redis.call('HKEYS', answers)) do
    if tonumber(each) < oldest then redis.call('HDEL', answers, each) end
  end
end

redis.call('ZADD', routers, now, ARGV[2])
redis.call('ZREMRANGEBYSCORE', routers, '-inf', now - {ROUTER_MS})
local answer = {{redis.call('ZCARD', routers)}}

local function rate(name, per_minute, need, want, back)
  if per_minute == 0 then return 0, 0, 0 end
  local level = per_minute
  local stored = redis.call('HGET', levels, name)
  if stored then
    local was, at = string.match(stored, '([^|]+)|(%d+)')
    level = tonumber(was) + math.max(0, now - tonumber(at)) * per_minute / 60000
  end
  level = math.min(per_minute, level + back)
  local granted, wait = 0, 0
  if level >= need then granted = math.floor(math.min(want, level))
  else wait = math.ceil((need - level) * 60000 / per_minute) end
  redis.call('HSET', levels, name, string.format('%.3f|%d', level - granted, now))
  return granted, math.floor(level - granted), wait
end

local function quota(hash, most, need, want, back)
  if most == 0 then return 0, 0 end
  local left = most - tonumber(redis.call('HGET', used, hash) or 0) + back
  local granted = 0
  if left >= need then granted = math.min(want, left) end
  redis.call('HSET', used, hash, string.format('%d', math.max(0, most - left + granted)))
  return granted, math.max(0, left - granted)
end

for i = 5, #ARGV, 11 do
  local hash = ARGV[i]
  local record = redis.call('HGET', keys, hash)
  if record and redis.call('SISMEMBER', revoked, hash) == 0 then
    local n = {{}}
    for j = 1, 10 do n[j] = tonumber(ARGV[i + j]) end
    local key = cjson.decode(record)
    if n[10] > 0 then redis.call('HINCRBY', used, hash, n[10]) end
    local rg, rl, rw = rate(hash .. ':requests', key.requests_per_minute, n[1], n[2], n[3])
    local tg, tl, tw = rate(hash .. ':tokens', key.tokens_per_minute, n[4], n[5], n[6])
    local qg, ql = quota(hash, key.quota_tokens, n[7], n[8], n[9])
    answer[#answer + 1] = {{hash, rg, rl, rw, tg, tl, tw, qg, ql, 0}}
  end
end
if number ~= '0' then
  redis.call('HSET', answers, number, cmsgpack.pack(answer))
  redis.call('PEXPIRE', answers, {ANSWERS_MS})
end
return answer
"""
)
