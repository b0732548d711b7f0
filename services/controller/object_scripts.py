"""The Lua that changes stored objects, run by the Redis server one script at a time.

Keys (one hash tag, so a Redis Cluster keeps them on one node; NAME is kind:owner:id):

    object NAME   hash   data, version, holder, holder_until (ms)     ends with the object's time
    parts NAME    hash   number -> bytes                               ends with the object's time
    list          zset   ids of a kind and owner, by creation (ms)
    ends          zset   NAME -> end of its time, ms of the server's clock
    sizes         hash   NAME -> bytes of document and parts
    totals        hash   nbytes: the sum of sizes

Redis itself removes what has ended; each script that adds first takes some of the ended out of the sums.
"""

from __future__ import annotations

_PRELUDE = """
local object, parts, list, ends, sizes, totals = unpack(KEYS)
local name, id = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function forget(member)
  local size = tonumber(redis.call('HGET', sizes, member) or 0)
  redis.call('HDEL', sizes, member)
  redis.call('ZREM', ends, member)
  redis.call('HINCRBY', totals, 'nbytes', -size)
end

local function make_room()
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now, 'LIMIT', 0, 256)) do forget(member) end
end

local function grow(by, most, most_in_all)
  local size = tonumber(redis.call('HGET', sizes, name) or 0)
  local total = tonumber(redis.call('HGET', totals, 'nbytes') or 0)
  if by > 0 and size + by > most then return -2 end
  if by > 0 and total + by > most_in_all then return -3 end
  redis.call('HINCRBY', sizes, name, by)
  redis.call('HINCRBY', totals, 'nbytes', by)
  return 0
end
"""

# name, id, data, ttl ms (0 keeps), expected version (-1 any), most bytes, most bytes in all
# -> {1 stored | 0 other version | -1 no object and no ttl | -2 too large | -3 full, version}
PUT = (
    _PRELUDE
    + """
local data, ttl, expected = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
make_room()
local version = tonumber(redis.call('HGET', object, 'version') or 0)
if expected >= 0 and expected ~= version then return {0, version} end
if version == 0 and ttl == 0 then return {-1, 0} end
if version == 0 then
  forget(name)
  redis.call('DEL', parts)
end
local refused = grow(#data - redis.call('HSTRLEN', object, 'data'), tonumber(ARGV[6]), tonumber(ARGV[7]))
if refused ~= 0 then return {refused, version} end
redis.call('HSET', object, 'data', data, 'version', version + 1)
if version == 0 then redis.call('ZADD', list, now, id) end
if ttl > 0 then
  local ending = now + ttl
  redis.call('ZADD', ends, ending, name)
  redis.call('PEXPIREAT', object, ending)
  redis.call('PEXPIREAT', parts, ending)
  if redis.call('PEXPIRETIME', list) < ending then redis.call('PEXPIREAT', list, ending) end
end
return {1, version + 1}
"""
)

# name, id, holder ('' anybody), most bytes, most bytes in all, (number, bytes) ...
# -> how many were added | -1 no object | -2 too large | -3 full | -4 held by somebody else
PUT_PARTS = (
    _PRELUDE
    + """
local holder = ARGV[3]
make_room()
local ending = redis.call('PEXPIRETIME', object)
if ending < 0 then return -1 end
if holder ~= '' then
  local found = redis.call('HMGET', object, 'holder', 'holder_until')
  if found[1] ~= holder or tonumber(found[2]) < now then return -4 end
end
local fresh, size = {}, 0
for i = 6, #ARGV, 2 do
  if redis.call('HEXISTS', parts, ARGV[i]) == 0 then
    fresh[#fresh + 1] = i
    size = size + #ARGV[i + 1]
  end
end
local refused = grow(size, tonumber(ARGV[4]), tonumber(ARGV[5]))
if refused ~= 0 then return refused end
for _, i in ipairs(fresh) do redis.call('HSET', parts, ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIREAT', parts, ending)
return #fresh
"""
)

# name, id -> {data, version, size, number of parts, ms left, holder} | nothing
GET = (
    _PRELUDE
    + """
local found = redis.call('HMGET', object, 'data', 'version', 'holder', 'holder_until')
if not found[2] then return nil end
local holder = ''
if found[3] and tonumber(found[4]) >= now then holder = found[3] end
local size = redis.call('HGET', sizes, name) or 0
local left = redis.call('PEXPIRETIME', object) - now
return {found[1], tonumber(found[2]), tonumber(size), redis.call('HLEN', parts), left, holder}
"""
)

# name, id -> 1 if it was there
DELETE = (
    _PRELUDE
    + """
forget(name)
redis.call('ZREM', list, id)
return redis.call('DEL', object, parts) > 0 and 1 or 0
"""
)

# name, id, holder, ttl ms (0 gives back) -> 1 held, 0 not | -1 no object
CLAIM = (
    _PRELUDE
    + """
local holder, ttl = ARGV[3], tonumber(ARGV[4])
if redis.call('EXISTS', object) == 0 then return -1 end
local found = redis.call('HMGET', object, 'holder', 'holder_until')
if found[1] and found[1] ~= holder and tonumber(found[2]) >= now then return 0 end
if ttl == 0 then
  redis.call('HDEL', object, 'holder', 'holder_until')
  return 0
end
redis.call('HSET', object, 'holder', holder, 'holder_until', now + ttl)
return 1
"""
)

# kind:owner, id to go on after ('' the first page), limit, key before ids
# -> {1 if there are more, {id, data, version, size, number of parts, ms left, holder} ...} | -1 no such id
LIST = (
    _PRELUDE
    + """
local limit, before, from = tonumber(ARGV[3]), ARGV[4], 0
if id ~= '' then
  local rank = redis.call('ZREVRANK', list, id)
  if not rank then return -1 end
  from = rank + 1
end
local out, gone = {0}, {}
while #out <= limit do
  local ids = redis.call('ZREVRANGE', list, from, from + 63)
  if #ids == 0 then break end
  for _, each in ipairs(ids) do
    local key = before .. each
    local found = redis.call('HMGET', key, 'data', 'version', 'holder', 'holder_until')
    if not found[2] then
      gone[#gone + 1] = each
    elseif #out > limit then
      out[1] = 1
      break
    else
      local holder = ''
      if found[3] and tonumber(found[4]) >= now then holder = found[3] end
      local size = redis.call('HGET', sizes, name .. ':' .. each) or 0
      local left = redis.call('PEXPIRETIME', key) - now
      out[#out + 1] = {each, found[1], tonumber(found[2]), tonumber(size), 0, left, holder}
    end
  end
  if #out > limit and out[1] == 0 then
    out[1] = redis.call('ZCARD', list) > from + #ids and 1 or 0
  end
  from = from + #ids
end
for _, each in ipairs(gone) do redis.call('ZREM', list, each) end
return out
"""
)

# name, id, number ... -> the parts, nothing for those that are missing
GET_PARTS = _PRELUDE + "return redis.call('HMGET', parts, unpack(ARGV, 3))"

# name, id -> the numbers
LIST_PARTS = _PRELUDE + "return redis.call('HKEYS', parts)"
