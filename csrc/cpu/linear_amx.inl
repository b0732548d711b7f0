// bfloat16 x bfloat16 products on AMX tiles: out^T = weight * x^T, so that the weights' rows are loaded as they
// lie in a checkpoint and x, which is small, is repacked: [16 rows of x][32 columns][pair][row][2].
//
// A task is kGroup rows of the weight times all rows of x, 32 at a time. Every element is the same chain of tile
// products along K whatever the batch, as in linear.inl.

namespace {

constexpr int64_t kAmxRows = 16, kAmxColumns = 32;  // of a tile of bfloat16
constexpr int64_t kGroup = 2 * kAmxRows;            // rows of the weight in a step

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Rows [m, m + 16) of x as tiles, zeros beyond M and K.
void pack_tiles(const LinearCall& call, int64_t m, uint16_t* out) {
  const uint16_t* x = static_cast<const uint16_t*>(call.x);
  for (int64_t k = 0; k < call.k; k += kAmxColumns) {
    for (int64_t pair = 0; pair < kAmxRows; ++pair) {
      for (int64_t i = 0; i < kAmxRows; ++i, out += 2) {
        const int64_t column = k + 2 * pair;
        const uint16_t* from = x + (m + i) * call.x_stride + column;
        out[0] = m + i < call.m && column < call.k ? from[0] : 0;
        out[1] = m + i < call.m && column + 1 < call.k ? from[1] : 0;
      }
    }
  }
}

// sums[m][n] of 32 weight rows and 16 * MB rows of x. `rest`: the weights' last columns, filled up with zeros.
template <int MB>
void amx_group(const uint16_t* w, int64_t w_stride, int64_t k, const uint16_t* x, int64_t x_block, const uint16_t* rest,
               float* sums) {
  const int64_t w_bytes = w_stride * 2, half = kAmxRows * w_stride;
  asm volatile("" ::: "memory");  // the tile loads of some compilers do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  if (MB == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += kAmxColumns, x += kAmxRows * kAmxColumns) {
    _tile_loadd(4, x, 64);
    if (MB == 2) _tile_loadd(5, x + x_block, 64);
    if (i + kAmxColumns <= k) {
      _tile_loadd(6, w + i, w_bytes);
      _tile_loadd(7, w + half + i, w_bytes);
    } else {
      _tile_loadd(6, rest, 64);
      _tile_loadd(7, rest + kAmxRows * kAmxColumns, 64);
    }
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 7, 4);
    if (MB == 2) {
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  alignas(64) float turned[MB][kGroup * kAmxRows];
  _tile_stored(0, turned[0], 64);
  _tile_stored(1, turned[0] + kAmxRows * kAmxRows, 64);
  if (MB == 2) {
    _tile_stored(2, turned[MB - 1], 64);
    _tile_stored(3, turned[MB - 1] + kAmxRows * kAmxRows, 64);
  }
  for (int64_t m = 0; m < MB * kAmxRows; ++m) {
    const float* column = turned[m / kAmxRows] + m % kAmxRows;
    for (int64_t n = 0; n < kGroup; ++n) sums[m * kGroup + n] = column[n * kAmxRows];
  }
}

bool amx_fits(const LinearCall& call) {
  return call.x_dtype == kBfloat16 && call.weight_dtype == kBfloat16 && call.n >= kGroup;
}

void linear_amx(const LinearCall& call, int threads) {
  const int64_t blocks = (call.m + kAmxRows - 1) / kAmxRows, chunks = (call.k + kAmxColumns - 1) / kAmxColumns;
  const int64_t x_block = chunks * kAmxRows * kAmxColumns;
  uint16_t* x = static_cast<uint16_t*>(thread_arena(kAroundTasks)->get(blocks * x_block * 2));
  parallel(call.m * call.k > 65536 ? threads : 1, blocks,
           [&](int64_t b) { pack_tiles(call, b * kAmxRows, x + b * x_block); });

  const int64_t groups = (call.n + kGroup - 1) / kGroup;
  const int64_t run = std::max<int64_t>(1, std::min(groups / (4 * threads), 1000000 / (call.k * (call.m + 16))));
  const auto work = [&](int64_t task) {
    const TileConfig config;
    _tile_loadconfig(&config);
    alignas(64) uint16_t rest[kGroup * kAmxColumns];
    float sums[2 * kAmxRows * kGroup], bias[kGroup];
    for (int64_t group = task * run; group < std::min(groups, (task + 1) * run); ++group) {
      // The last group starts early where N is no multiple; it stores only what is its own.
      const int64_t first = group * kGroup, from = std::min(first, call.n - kGroup), skip = first - from;
      const uint16_t* w = static_cast<const uint16_t*>(call.weight) + from * call.weight_stride;
      const int64_t whole = call.k / kAmxColumns * kAmxColumns;
      if (whole < call.k) {
        std::memset(rest, 0, sizeof(rest));
        for (int64_t n = 0; n < kGroup; ++n) {
          std::memcpy(rest + n * kAmxColumns, w + n * call.weight_stride + whole, (call.k - whole) * 2);
        }
      }
      if (call.bias != nullptr) load_row(call.bias, from, kBfloat16, kGroup, bias);
      for (int64_t b = 0; b < blocks; b += 2) {
        const auto fn = b + 1 < blocks ? amx_group<2> : amx_group<1>;
        fn(w, call.weight_stride, call.k, x + b * x_block, x_block, rest, sums);
        for (int64_t m = 0; m < std::min(2 * kAmxRows, call.m - b * kAmxRows); ++m) {
          float* row = sums + m * kGroup;
          for (int64_t n = 0; call.bias != nullptr && n < kGroup; ++n) row[n] += bias[n];
          store_row(call.out, (b * kAmxRows + m) * call.out_stride + first, call.out_dtype, kGroup - skip, row + skip);
        }
      }
    }
    _tile_release();
  };
  parallel(threads, (groups + run - 1) / run, work);
}

}  // namespace
