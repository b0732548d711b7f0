"""The Lua that changes state, run by the Redis server one script at a time: the only place where state changes.

Keys (all share one hash tag, so a Redis Cluster keeps them on one node):

    meta      hash    incarnation, revision, changes_id, loads_id, swept_at (ms)
    infos     hash    worker id -> description (JSON, no state, no load)
    epochs    hash    worker id -> epoch, decimal (as text: Lua numbers hold 53 bits)
    states    hash    worker id -> state the worker reports
    loads     hash    worker id -> load (JSON)
    leases    zset    worker id -> end of its lease, ms of the server's clock
    draining  set     worker ids that were asked to drain; outweighs the reported state
    changes   stream  one entry per revision
    loadlog   stream  latest loads, no revision

Every script first makes sure of an incarnation: when `meta` is gone (flush, eviction), what is left of the
rest is dropped and revisions begin anew under the incarnation that the caller offers in ARGV[1].
Works on Redis 7.0 and up and on Valkey; a server that loses its scripts gets them again by EVALSHA's fallback.
"""

from __future__ import annotations

KEY_NAMES = ("meta", "infos", "epochs", "states", "loads", "leases", "draining", "changes", "loadlog")
MAX_CHANGES = 4096  # kept for tails that fall behind; a longer gap is a resync
MAX_LOADS = 1024

_PRELUDE = f"""
local meta, infos, epochs, states, loads, leases, draining, changes, loadlog = unpack(KEYS)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local incarnation = redis.call('HGET', meta, 'incarnation')
if not incarnation then
  incarnation = ARGV[1]
  redis.call('DEL', infos, epochs, states, loads, leases, draining, changes, loadlog)
  redis.call('HSET', meta, 'incarnation', incarnation, 'revision', 0, 'changes_id', '0-0', 'loads_id', '0-0')
end

local function state_of(id)
  if redis.call('SISMEMBER', draining, id) == 1 then return 'draining' end
  return redis.call('HGET', states, id)
end

local function publish(kind, id, reason)
  local revision = redis.call('HINCRBY', meta, 'revision', 1)
  local entry = redis.call('XADD', changes, 'MAXLEN', '~', {MAX_CHANGES}, '*',
    'incarnation', incarnation, 'revision', revision, 'kind', kind, 'reason', reason,
    'info', redis.call('HGET', infos, id), 'state', state_of(id), 'load', redis.call('HGET', loads, id))
  redis.call('HSET', meta, 'changes_id', entry)
end

local function remove(id, reason)
  publish('removed', id, reason)
  redis.call('HDEL', infos, id)
  redis.call('HDEL', epochs, id)
  redis.call('HDEL', states, id)
  redis.call('HDEL', loads, id)
  redis.call('ZREM', leases, id)
  redis.call('SREM', draining, id)
end
"""

# id, epoch, info, state, load, ttl ms -> 1 if another epoch of the same id was replaced
REGISTER = (
    _PRELUDE
    + """
local id, epoch, info, state, load, ttl = unpack(ARGV, 2)
local had = redis.call('HGET', epochs, id)
local replaced = 0
if had and had ~= epoch then
  remove(id, 'replaced')
  had, replaced = false, 1
end
local old_info, old_state = redis.call('HGET', infos, id), had and state_of(id)
redis.call('HSET', infos, id, info)
redis.call('HSET', epochs, id, epoch)
redis.call('HSET', states, id, state)
redis.call('HSET', loads, id, load)
redis.call('ZADD', leases, now + ttl, id)
if not had then
  publish('added', id, '')
elseif old_info ~= info or old_state ~= state_of(id) then
  publish('updated', id, '')
end
return replaced
"""
)

# id, epoch, state, load, ttl ms -> {1 if known, 1 if asked to drain}
HEARTBEAT = (
    _PRELUDE
    + f"""
local id, epoch, state, load, ttl = unpack(ARGV, 2)
if redis.call('HGET', epochs, id) ~= epoch then return {{0, 0}} end
local old_state = state_of(id)
redis.call('HSET', states, id, state)
redis.call('ZADD', leases, now + ttl, id)
if redis.call('HGET', loads, id) ~= load then
  redis.call('HSET', loads, id, load)
  local entry = redis.call('XADD', loadlog, 'MAXLEN', '~', {MAX_LOADS}, '*',
    'incarnation', incarnation, 'id', id, 'epoch', epoch, 'load', load)
  redis.call('HSET', meta, 'loads_id', entry)
end
if old_state ~= state_of(id) then publish('updated', id, '') end
return {{1, redis.call('SISMEMBER', draining, id)}}
"""
)

# id, epoch ('0' is any) -> 1 if known
DRAIN = (
    _PRELUDE
    + """
local id, epoch = unpack(ARGV, 2)
local had = redis.call('HGET', epochs, id)
if not had or (epoch ~= '0' and had ~= epoch) then return 0 end
local old_state = state_of(id)
redis.call('SADD', draining, id)
if old_state ~= 'draining' then publish('updated', id, '') end
return 1
"""
)

# id, epoch ('0' is any) -> 1 if it was removed
DEREGISTER = (
    _PRELUDE
    + """
local id, epoch = unpack(ARGV, 2)
local had = redis.call('HGET', epochs, id)
if not had or (epoch ~= '0' and had ~= epoch) then return 0 end
remove(id, 'deregistered')
return 1
"""
)

# ttl ms, forgive -> {ms until the next lease ends or -1, expired ids ...}
# Leases are forgiven (extended, none expires) when nobody could renew them or time is not to be trusted: the
# caller knows of an outage, nobody swept for two TTLs, or the server's clock went back.
SWEEP = (
    _PRELUDE
    + """
local ttl, forgive = tonumber(ARGV[2]), ARGV[3] == '1'
local last = tonumber(redis.call('HGET', meta, 'swept_at') or now)
redis.call('HSET', meta, 'swept_at', now)
if forgive or now < last or now - last > 2 * ttl then
  for _, id in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
    redis.call('ZADD', leases, now + ttl, id)
  end
end
local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', now)
for _, id in ipairs(expired) do remove(id, 'expired') end
local first = redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')
local wait = -1
if first[2] then wait = first[2] - now end
return {wait, unpack(expired)}
"""
)

# -> {incarnation, revision, changes_id, loads_id, {info, state, load} ...}
SNAPSHOT = (
    _PRELUDE
    + """
local answer = redis.call('HMGET', meta, 'incarnation', 'revision', 'changes_id', 'loads_id')
for _, id in ipairs(redis.call('HKEYS', infos)) do
  answer[#answer + 1] = {redis.call('HGET', infos, id), state_of(id), redis.call('HGET', loads, id)}
end
return answer
"""
)

# -> {incarnation, revision}
HEAD = _PRELUDE + "return redis.call('HMGET', meta, 'incarnation', 'revision')"
