// The lightning indexer's scores in bfloat16 on AMX tiles: 16 keys, as they lie in the cache or unpacked, times 16
// heads, which are repacked once for a stretch of positions. Each score is the same chain of tile products and
// additions in any batch.

namespace {

bool amx_fits(const SelectCall& call) {
  return call.q_dtype == kBfloat16 && is_split(call.cache_dtype) && call.width % kAmxColumns == 0 &&
         call.block_size % kAmxRows == 0;
}

// out[head tile][column chunk] = [pair of columns][head][2], zeros beyond the last head.
void pack_heads(const SelectCall& call, int64_t token, int64_t tiles, uint16_t* out) {
  const uint16_t* q = static_cast<const uint16_t*>(call.q) + token * call.q_token_stride;
  for (int64_t first = 0; first < tiles * kAmxRows; first += kAmxRows) {
    for (int64_t k = 0; k < call.width; k += kAmxColumns) {
      for (int64_t pair = 0; pair < kAmxRows; ++pair) {
        for (int64_t head = first; head < first + kAmxRows; ++head, out += 2) {
          if (head < call.heads) {
            std::memcpy(out, q + head * call.q_head_stride + k + 2 * pair, 4);
          } else {
            out[0] = out[1] = 0;
          }
        }
      }
    }
  }
}

// sums[key] += weights * max(0, products) of 16 keys and NT tiles of heads, lanes of heads side by side.
template <int NT>
void amx_scores(const uint16_t* keys, int64_t stride, int64_t width, const uint16_t* q, const float* weights, V* sums) {
  const int64_t tile = kAmxRows * kAmxColumns, tiles_of_head = width / kAmxColumns * tile;
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if (NT > 1) _tile_zero(1);
  if (NT > 2) _tile_zero(2);
  if (NT > 3) _tile_zero(3);
  for (int64_t k = 0; k < width; k += kAmxColumns, q += tile) {
    _tile_loadd(4, keys + k, stride * 2);
    _tile_loadd(5, q, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (NT > 1) {
      _tile_loadd(6, q + tiles_of_head, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (NT > 2) {
      _tile_loadd(5, q + 2 * tiles_of_head, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if (NT > 3) {
      _tile_loadd(6, q + 3 * tiles_of_head, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  alignas(64) float products[NT][kAmxRows * kAmxRows];
  _tile_stored(0, products[0], 64);
  if (NT > 1) _tile_stored(1, products[NT > 1 ? 1 : 0], 64);
  if (NT > 2) _tile_stored(2, products[NT > 2 ? 2 : 0], 64);
  if (NT > 3) _tile_stored(3, products[NT > 3 ? 3 : 0], 64);
  for (int t = 0; t < NT; ++t) {
    const V weight = F::load(weights + t * kAmxRows);
    for (int64_t key = 0; key < kAmxRows; ++key) {
      sums[key] = F::fma(weight, F::max(F::load(products[t] + key * kAmxRows), F::zero()), sums[key]);
    }
  }
}

// As `score_positions`; low is a multiple of 16.
void score_positions_amx(const SelectCall& call, const Seeker& seeker, int64_t low, int64_t high, float* scores) {
  const int64_t tiles = (call.heads + kAmxRows - 1) / kAmxRows;
  const int64_t q_size = tiles * kAmxRows * call.width;
  const bool packed = call.cache_dtype == kPacked;
  const int64_t unpacked = packed ? kAmxRows * call.width : 0;
  const int64_t weights_at = (q_size + unpacked) * 2;
  char* memory = static_cast<char*>(thread_arena()->get(weights_at + tiles * kAmxRows * sizeof(float)));
  uint16_t* q = reinterpret_cast<uint16_t*>(memory);
  float* weights = reinterpret_cast<float*>(memory + weights_at);
  pack_heads(call, seeker.token, tiles, q);
  for (int64_t head = 0; head < tiles * kAmxRows; ++head) {
    weights[head] = head < call.heads ? call.weights[seeker.token * call.weights_stride + head] * call.scale : 0.0f;
  }
  const int32_t* table = call.block_tables + seeker.sequence * call.table_stride;
  const auto keys_at = [&](int64_t position) {
    const int64_t at =
        table[position / call.block_size] * call.block_stride + position % call.block_size * call.token_stride;
    return static_cast<const char*>(call.cache) + (packed ? at : at * 2);
  };
  const int64_t row_nbytes = packed ? call.token_stride : call.token_stride * 2;
  constexpr int64_t kAhead = 2 * kAmxRows;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t first = low; first < high; first += kAmxRows) {
    const uint16_t* keys = reinterpret_cast<const uint16_t*>(keys_at(first));
    int64_t stride = call.token_stride;
    if (first + kAhead < high) {
      const char* next = keys_at(first + kAhead);
      for (int64_t i = 0; i < kAmxRows * row_nbytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    if (packed) {
      unpack_keys(call, reinterpret_cast<const Packed*>(keys), kAmxRows, reinterpret_cast<Bfloat*>(q + q_size));
      keys = q + q_size;
      stride = call.width;
    }
    V sums[kAmxRows];
    for (V& sum : sums) sum = F::zero();
    for (int64_t t = 0; t < tiles; t += 4) {
      const uint16_t* heads = q + t * kAmxRows * call.width;
      const float* w = weights + t * kAmxRows;
      switch (std::min<int64_t>(4, tiles - t)) {
        case 4:
          amx_scores<4>(keys, stride, call.width, heads, w, sums);
          break;
        case 3:
          amx_scores<3>(keys, stride, call.width, heads, w, sums);
          break;
        case 2:
          amx_scores<2>(keys, stride, call.width, heads, w, sums);
          break;
        default:
          amx_scores<1>(keys, stride, call.width, heads, w, sums);
      }
    }
    float totals[kAmxRows];
    for (int64_t i = 0; i < kAmxRows; i += 4) F::sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], totals + i);
    std::memcpy(scores + first - low, totals, std::min<int64_t>(kAmxRows, high - first) * sizeof(float));
  }
  _tile_release();
}

}  // namespace
