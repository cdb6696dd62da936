"""What must happen atomically inside Redis, in Lua. Each script reads and decides first, then writes.

Redis runs a script alone and logs its effects as one transaction. It refuses the first write when memory is
full and none after that, so a script is applied whole or not at all there too.
"""

from __future__ import annotations

APPLY = """
-- KEYS[1]: the seq counter; then the keys of each change. ARGV: for each change its name and arguments:
--   create  keys record, tenant index, kind index   args member, value
--   update  keys record                             args version, seq, value
--   delete  keys record, tenant index, kind index   args member, version, seq
--   append  keys stream                             args value
--   link    keys blob, links                        args owner
--   unlink  keys blob, links                        args owner
-- Returns {'ok', version, seq, version, seq, ...} of the records created and updated,
-- or {'stale', i} or {'missing', i}: change i, counted from 0, cannot be applied.
local NUM_KEYS = {create = 3, update = 1, delete = 3, append = 1, link = 2, unlink = 2}
local NUM_ARGS = {create = 2, update = 3, delete = 3, append = 1, link = 1, unlink = 1}

local function text(number)
  return string.format('%.0f', number)
end

local changes = {}
local key_idx, arg_idx = 2, 1
while arg_idx <= #ARGV do
  local change = {name = ARGV[arg_idx], keys = {}, args = {}}
  arg_idx = arg_idx + 1
  for _ = 1, NUM_KEYS[change.name] do
    table.insert(change.keys, KEYS[key_idx])
    key_idx = key_idx + 1
  end
  for _ = 1, NUM_ARGS[change.name] do
    table.insert(change.args, ARGV[arg_idx])
    arg_idx = arg_idx + 1
  end
  table.insert(changes, change)
end

local states = {}
local function state_of(key)
  if states[key] == nil then
    local found = redis.call('HMGET', key, 'version', 'seq')
    states[key] = found[1] and {version = found[1], seq = found[2]} or false
  end
  return states[key]
end

local function is_stale(key, version, seq)
  local state = state_of(key)
  return not state or state.version ~= version or state.seq ~= seq
end

for i, change in ipairs(changes) do
  local key, args = change.keys[1], change.args
  if change.name == 'create' then
    if state_of(key) then return {'stale', i - 1} end
    states[key] = {version = '1', seq = 'new'}
  elseif change.name == 'update' then
    if is_stale(key, args[1], args[2]) then return {'stale', i - 1} end
    states[key] = {version = text(tonumber(args[1]) + 1), seq = args[2]}
  elseif change.name == 'delete' then
    if is_stale(key, args[2], args[3]) then return {'stale', i - 1} end
    states[key] = false
  elseif change.name == 'link' then
    if redis.call('EXISTS', key) == 0 then return {'missing', i - 1} end
  end
end

local time = redis.call('TIME')
local now_us = text(tonumber(time[1]) * 1000000 + tonumber(time[2]))
local result = {'ok'}
local unlinked = {}
for _, change in ipairs(changes) do
  local keys, args = change.keys, change.args
  if change.name == 'create' then
    local seq = text(redis.call('INCR', KEYS[1]))
    redis.call('HSET', keys[1], 'value', args[2], 'version', '1', 'seq', seq)
    redis.call('ZADD', keys[2], seq, args[1])
    redis.call('ZADD', keys[3], seq, args[1])
    table.insert(result, '1')
    table.insert(result, seq)
  elseif change.name == 'update' then
    local version = text(tonumber(args[1]) + 1)
    redis.call('HSET', keys[1], 'value', args[3], 'version', version)
    table.insert(result, version)
    table.insert(result, args[2])
  elseif change.name == 'delete' then
    redis.call('DEL', keys[1])
    redis.call('ZREM', keys[2], args[1])
    redis.call('ZREM', keys[3], args[1])
  elseif change.name == 'append' then
    redis.call('RPUSH', keys[1], args[1])
  elseif change.name == 'link' then
    redis.call('HSET', keys[2], args[1], now_us)
  else
    local linked_at = redis.call('HGET', keys[2], args[1])
    if linked_at then
      redis.call('HDEL', keys[2], args[1])
      local last = unlinked[keys[1]] or {links = keys[2], at = 0}
      last.at = math.max(last.at, tonumber(linked_at))
      unlinked[keys[1]] = last
    end
  end
end

for blob, last in pairs(unlinked) do
  local put_at = redis.call('HGET', blob, 'put_at')
  if put_at and tonumber(put_at) <= last.at and redis.call('EXISTS', last.links) == 0 then
    redis.call('UNLINK', blob)
  end
end
return result
"""

LIST = """
-- KEYS: index. ARGV: record prefix, 'newest' or 'oldest', limit or '', member or '', or
-- the end of a member or ''. At most one of the last two is given; the listing starts after what it names.
-- Returns {member, value, version, seq, ...}, or nothing if not exactly one member is named.
local newest = ARGV[2] == 'newest'
local rank = -1
local after = ARGV[4]
if ARGV[5] ~= '' then
  local found = {}
  for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if string.sub(name, -#ARGV[5]) == ARGV[5] then table.insert(found, name) end
  end
  if #found ~= 1 then return false end
  after = found[1]
end
if after ~= '' then
  rank = redis.call(newest and 'ZREVRANK' or 'ZRANK', KEYS[1], after)
  if not rank then return false end
end
local result = {}
local stop = -1
if ARGV[3] ~= '' then
  if ARGV[3] == '0' then return result end
  stop = rank + tonumber(ARGV[3])
end
for _, name in ipairs(redis.call(newest and 'ZREVRANGE' or 'ZRANGE', KEYS[1], rank + 1, stop)) do
  local record = redis.call('HMGET', ARGV[1] .. name, 'value', 'version', 'seq')
  table.insert(result, name)
  table.insert(result, record[1])
  table.insert(result, record[2])
  table.insert(result, record[3])
end
return result
"""

PUBLISH_BLOB = """
-- KEYS: upload, blob. ARGV: size in bytes, number of chunks. Returns 1, or 0 if the server lost chunks.
if redis.call('HLEN', KEYS[1]) ~= tonumber(ARGV[2]) then return 0 end
local time = redis.call('TIME')
local now_us = string.format('%.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
redis.call('HSET', KEYS[1], 'size', ARGV[1], 'chunks', ARGV[2], 'put_at', now_us)
redis.call('PERSIST', KEYS[1])
redis.call('UNLINK', KEYS[2])
redis.call('RENAME', KEYS[1], KEYS[2])
return 1
"""

COLLECT_BLOB = """
-- KEYS: blob, links. ARGV: age in microseconds. Deletes the blob if older and not linked; returns how many.
local put_at = redis.call('HGET', KEYS[1], 'put_at')
if not put_at or redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local time = redis.call('TIME')
if tonumber(put_at) >= tonumber(time[1]) * 1000000 + tonumber(time[2]) - tonumber(ARGV[1]) then return 0 end
return redis.call('UNLINK', KEYS[1])
"""
