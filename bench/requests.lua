-- The requests of one wrk round. Arguments after `--`: KIND [CONSISTENCY] KEYS
--   put KEYS | get CONSISTENCY KEYS | etcd_put KEYS | etcd_range CONSISTENCY KEYS
-- Every request is formatted once, before the round: wrk.format per request would measure wrk.
-- Run with one thread (-t1): the counter below then walks the whole key space.

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

function init(args)
  local format, keys = formats[args[1]], tonumber(args[#args])
  for i = 0, keys - 1 do
    requests[i] = format(("bench-%06d"):format(i), args[2])
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
