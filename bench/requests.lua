-- The requests of one wrk round. Arguments after `--`: KIND [CONSISTENCY] KEYS
--   put KEYS | get CONSISTENCY KEYS | txn KEYS
--   etcd_put KEYS | etcd_range CONSISTENCY KEYS | etcd_txn KEYS
-- Every request is formatted once, before the round: wrk.format per request would measure wrk.
-- Run with one thread (-t1): the counter below then walks the whole key space.

local TXN_PUTS = 64  -- as in systems.py
local REQUESTS_MAX = 100000  -- of more keys, as many as this, spread over all of them
local STEP = 7919  -- a prime, so any key space it does not divide is visited completely, out of order
local requests = {}
local counter = 0

local ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function base64(text)
  local out = {}
  for i = 1, #text, 3 do
    local a, b, c = text:byte(i, i + 2)
    local bits = a * 65536 + (b or 0) * 256 + (c or 0)
    for shift = 0, 3 do
      local digit = math.floor(bits / 64 ^ (3 - shift)) % 64
      out[#out + 1] = ALPHABET:sub(digit + 1, digit + 1)
    end
    if not c then out[#out] = "=" end
    if not b then out[#out - 1] = "=" end
  end
  return table.concat(out)
end

local VALUE = ("0123456789abcdef"):rep(16)  -- 256 bytes
local VALUE_BASE64 = base64(VALUE)
local JSON = { ["Content-Type"] = "application/json" }

local function name(i)
  return ("bench-%06d"):format(i)
end

local formats = {
  put = function(key)
    return wrk.format("PUT", "/v1/kv/" .. key, nil, VALUE)
  end,
  get = function(key, consistency)
    return wrk.format("GET", "/v1/kv/" .. key .. "?consistency=" .. consistency)
  end,
  etcd_put = function(key)
    local body = ('{"key":"%s","value":"%s"}'):format(base64(key), VALUE_BASE64)
    return wrk.format("POST", "/v3/kv/put", JSON, body)
  end,
  etcd_range = function(key, consistency)
    local serializable = tostring(consistency == "serializable")
    local body = ('{"key":"%s","serializable":%s}'):format(base64(key), serializable)
    return wrk.format("POST", "/v3/kv/range", JSON, body)
  end,
}

-- One request for each TXN_PUTS keys; together they write all of them, as far as that is even.
local function transactions(path, put, around, keys)
  for i = 0, math.floor(keys / TXN_PUTS) - 1 do
    local puts = {}
    for j = 1, TXN_PUTS do
      puts[j] = put(name(i * TXN_PUTS + j - 1))
    end
    requests[i] = wrk.format("POST", path, JSON, around:format(table.concat(puts, ",")))
  end
end

local transaction = {
  txn = function(keys)
    local put = function(key)
      return ('{"op":"put","key":"%s","value":"%s"}'):format(key, VALUE)
    end
    transactions("/v1/txn", put, '{"success":[%s]}', keys)
  end,
  etcd_txn = function(keys)
    local put = function(key)
      return ('{"requestPut":{"key":"%s","value":"%s"}}'):format(base64(key), VALUE_BASE64)
    end
    transactions("/v3/kv/txn", put, '{"success":[%s]}', keys)
  end,
}

function init(args)
  local kind, keys = args[1], tonumber(args[#args])
  if transaction[kind] then
    transaction[kind](keys)
    return
  end
  for i = 0, math.min(keys, REQUESTS_MAX) - 1 do
    requests[i] = formats[kind](name(math.floor(i * keys / math.min(keys, REQUESTS_MAX))), args[2])
  end
end

function request()
  counter = counter + 1
  return requests[(counter * STEP) % (#requests + 1)]
end

-- One JSON line for bench/load.py. errors.status counts answers above 399; nobody here redirects.
function done(summary, latency)
  local e = summary.errors
  local line = '{"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"max_us":%d,'
    .. '"status_errors":%d,"socket_errors":%d,"timeouts":%d}'
  print(line:format(summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), latency.max, e.status, e.connect + e.read + e.write, e.timeout))
end
