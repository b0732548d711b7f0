// Matrix products with weights as they lie in a checkpoint, [N, K] rows, upcast in registers; sums in fp32.
//
// An element of the result is one vector of partial sums, filled along K in steps of a pair, added up at the
// end of each kSlab columns: the same additions in the same order whatever M, N, the tile it falls into or the
// number of threads. A row of a batch is therefore bitwise what it is alone.
//
// A task is a stripe of weight rows times a band of rows of x. x is converted to floats in the order of pairs
// first, and stays in the L2 cache while the weights stream by.

namespace {

constexpr int64_t kSlab = 768;  // columns added up before they go to the band's sums
constexpr int64_t kBand = 48;   // rows of x
#if defined(ND_ISA_AVX512)
constexpr int kTileM = 4, kTileN = 5;
#else
constexpr int kTileM = 3, kTileN = 3;
#endif
// Rows of the weight: with a tile's rows of x they fit into the L1 cache.
template <typename T>
constexpr int64_t kStripe = kTileN * (16 / static_cast<int64_t>(sizeof(T)) / 2);

template <typename T, int MT, int NT>
struct Tile {
  V acc[MT * NT];

  __attribute__((always_inline)) void clear() {
#pragma GCC unroll 32
    for (int i = 0; i < MT * NT; ++i) acc[i] = F::zero();
  }

  // Adds the products of one pair of columns.
  __attribute__((always_inline)) void step(const float* x, int64_t x_stride, const T* w, int64_t w_stride) {
    V half[NT];
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) half[n] = Element<T>::pair0(w + n * w_stride);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const V xm = F::load(x + m * x_stride);
#pragma GCC unroll 8
      for (int n = 0; n < NT; ++n) acc[m * NT + n] = F::fma(xm, half[n], acc[m * NT + n]);
    }
    asm volatile("" ::: "memory");  // keeps the second half's loads out of the first: registers are few
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) half[n] = Element<T>::pair1(w + n * w_stride);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const V xm = F::load(x + m * x_stride + F::W);
#pragma GCC unroll 8
      for (int n = 0; n < NT; ++n) acc[m * NT + n] = F::fma(xm, half[n], acc[m * NT + n]);
    }
    asm volatile("" ::: "memory");
  }

  // out[m, n] = sums.
  __attribute__((always_inline)) void finish(float* out) {
    constexpr int count = MT * NT;
#pragma GCC unroll 8
    for (int i = 0; i + 4 <= count; i += 4) F::sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], out + i);
    if constexpr (count % 4 != 0) {
      constexpr int i = count / 4 * 4;
      constexpr int last = count - 1;
      float rest[4];
      F::sum4(acc[i], acc[i + 1 < count ? i + 1 : last], acc[i + 2 < count ? i + 2 : last], acc[last], rest);
      for (int j = 0; i + j < count; ++j) out[i + j] = rest[j];
    }
  }
};

// sums[m, n] of columns [0, k) of x rows (arranged, padded) and weight rows.
template <typename T, int MT, int NT>
void tile_sums(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t k, float* sums) {
  Tile<T, MT, NT> tile;
  tile.clear();
  int64_t i = 0;
  for (; i + kPair <= k; i += kPair) tile.step(x + i, x_stride, w + i, w_stride);
  if (i < k) {
    T rest[NT * kPair];
    std::memset(rest, 0, sizeof(rest));
    for (int n = 0; n < NT; ++n) std::memcpy(rest + n * kPair, w + n * w_stride + i, (k - i) * sizeof(T));
    tile.step(x + i, x_stride, rest, kPair);
  }
  tile.finish(sums);
}

template <typename T>
using TileSums = void (*)(const float*, int64_t, const T*, int64_t, int64_t, float*);

template <typename T, int NT>
constexpr TileSums<T> kTiles[4] = {tile_sums<T, 1, NT>, tile_sums<T, 2, NT>, tile_sums<T, 3, NT>,
                                   tile_sums<T, kTileM, NT>};

// sums[m, n] += products of `rows` x rows and `cols` weight rows over k columns.
template <typename T>
void stripe_sums(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t cols, int64_t k,
                 float* sums, int64_t sums_stride) {
  // The same columns of the next stripe come into the L2 cache meanwhile, a share of them with each tile's rows.
  const int64_t row_nbytes = k * sizeof(T), bands = (rows + kTileM - 1) / kTileM;
  const int64_t share = (row_nbytes / bands + 63) / 64 * 64;
  int64_t ahead = 0;
  float out[kTileM * kTileN];
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    const int mt = static_cast<int>(left == kTileM + 1 ? (left + 1) / 2 : left < kTileM ? left : kTileM);
    for (int64_t n = 0; n < cols;) {
      const int nt = n + kTileN <= cols ? kTileN : 1;
      const TileSums<T> fn = nt == 1 ? kTiles<T, 1>[mt - 1] : kTiles<T, kTileN>[mt - 1];
      for (int64_t j = 0; j < nt; ++j) {
        const char* next = reinterpret_cast<const char*>(w + (cols + n + j) * w_stride) + ahead;
        for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 2);
      }
      fn(x + m * x_stride, x_stride, w + n * w_stride, w_stride, k, out);
      for (int i = 0; i < mt; ++i) {
        for (int j = 0; j < nt; ++j) sums[(m + i) * sums_stride + n + j] += out[i * nt + j];
      }
      n += nt;
    }
    m += mt;
    ahead += share;
  }
}

template <typename T>
void linear_task(const LinearCall& call, const float* x, int64_t x_stride, int64_t first_m, int64_t first_n,
                 int64_t last_n) {
  constexpr int64_t kWide = 4 * kStripe<T>;  // columns of the result that are finished together
  const T* weight = static_cast<const T*>(call.weight);
  const int64_t rows = std::min(kBand, call.m - first_m);
  float sums[kBand * kWide];
  float bias[kWide];
  for (int64_t wide = first_n; wide < last_n; wide += kWide) {
    const int64_t end = std::min(wide + kWide, last_n);
    std::memset(sums, 0, rows * kWide * sizeof(float));
    for (int64_t n = wide; n < end; n += kStripe<T>) {
      for (int64_t k = 0; k < call.k; k += kSlab) {
        stripe_sums(x + first_m * x_stride + k, x_stride, rows, weight + n * call.weight_stride + k, call.weight_stride,
                    std::min(kStripe<T>, end - n), std::min(kSlab, call.k - k), sums + n - wide, kWide);
      }
    }
    if (call.bias != nullptr) to_floats(static_cast<const T*>(call.bias) + wide, end - wide, bias);
    for (int64_t m = 0; m < rows; ++m) {
      float* row = sums + m * kWide;
      if (call.bias != nullptr) {
        for (int64_t j = 0; j < end - wide; ++j) row[j] += bias[j];
      }
      store_row(call.out, (first_m + m) * call.out_stride + wide, call.out_dtype, end - wide, row);
    }
  }
}

template <typename T>
void linear_of(const LinearCall& call, int threads) {
  const int64_t x_stride = whole_pairs(call.k);
  float* x = static_cast<float*>(thread_arena(kAroundTasks)->get(call.m * x_stride * sizeof(float)));
  const auto convert = [&](int64_t m) {
    load_arranged(call.x, m * call.x_stride, call.x_dtype, call.k, Element<T>::kSplit, x + m * x_stride);
  };
  parallel(call.m * call.k > 65536 ? threads : 1, call.m, convert);

  // Work of one task: some 20 microseconds or a stripe, and a few tasks for every thread.
  const int64_t bands = (call.m + kBand - 1) / kBand;
  const int64_t stripes = (call.n + kStripe<T> - 1) / kStripe<T>;
  const int64_t cost = kStripe<T> * call.k * std::min(call.m + 4, kBand);  // multiplications of a stripe
  const int64_t fair = std::max<int64_t>(1, stripes * bands / (4 * threads));
  const int64_t least = (1000000 / cost + 3) / 4 * 4;  // whole kWides, as far as they are fair
  const int64_t run = threads == 1 ? stripes : std::max<int64_t>(1, std::min(fair, std::max<int64_t>(4, least)));
  const int64_t runs = (stripes + run - 1) / run;
  const auto work = [&](int64_t task) {
    const int64_t first_n = task % runs * run * kStripe<T>;
    const int64_t last_n = std::min(call.n, first_n + run * kStripe<T>);
    linear_task<T>(call, x, x_stride, task / runs * kBand, first_n, last_n);
  };
  parallel(threads, bands * runs, work);
}

void linear(const LinearCall& call, int threads) {
#if defined(ND_AMX)
  if (amx_fits(call)) return linear_amx(call, threads);
#endif
  if (call.weight_dtype == kFloat32) return linear_of<float>(call, threads);
  if (call.weight_dtype == kBfloat16) return linear_of<Bfloat>(call, threads);
  linear_of<Half>(call, threads);
}

void linear_batch(const LinearBatchCall& batch, int threads) {
  const auto size = [](Dtype dtype) { return dtype == kFloat32 ? 4 : 2; };
  const auto task = [&](int64_t i) {
    LinearCall call = batch.first;
    call.x = static_cast<const char*>(call.x) + i * batch.x_step * size(call.x_dtype);
    call.weight = static_cast<const char*>(call.weight) + i * batch.weight_step * size(call.weight_dtype);
    call.out = static_cast<char*>(call.out) + i * batch.out_step * size(call.out_dtype);
    linear(call, 1);
  };
  parallel(threads, batch.count, task);
}

// Tasks are pieces of the experts that have rows. A piece is whole groups of kPiece rows of the weight, so that it
// is computed by the same instructions as the whole.
void linear_experts(const ExpertsCall& call, int threads) {
  constexpr int64_t kPiece = 64;
  int64_t* touched = static_cast<int64_t*>(thread_arena(kBetweenTasks)->get(call.experts * sizeof(int64_t)));
  int64_t count = 0;
  for (int64_t e = 0; e < call.experts; ++e) {
    if (call.starts[e] < call.starts[e + 1]) touched[count++] = e;
  }
  const int64_t fair = call.n * count / (8 * threads) / kPiece * kPiece;
  const int64_t width = threads == 1 ? call.n : std::max(kPiece, fair);
  const int64_t pieces = std::max<int64_t>(1, call.n / width);  // the last one takes the rest
  const auto size_of = [](Dtype dtype) { return dtype == kFloat32 ? 4 : 2; };
  const auto work = [&](int64_t task) {
    const int64_t e = touched[task / pieces], piece = task % pieces, first = piece * width;
    LinearCall part;
    part.x = static_cast<const char*>(call.x) + call.starts[e] * call.x_stride * size_of(call.x_dtype);
    part.weight = static_cast<const char*>(call.weight) +
                  (e * call.expert_stride + first * call.weight_stride) * size_of(call.weight_dtype);
    part.bias = nullptr;
    part.out = static_cast<char*>(call.out) + (call.starts[e] * call.out_stride + first) * size_of(call.out_dtype);
    part.x_stride = call.x_stride, part.weight_stride = call.weight_stride, part.out_stride = call.out_stride;
    part.m = call.starts[e + 1] - call.starts[e];
    part.n = piece + 1 < pieces ? width : call.n - first;
    part.k = call.k;
    part.x_dtype = call.x_dtype, part.weight_dtype = call.weight_dtype, part.out_dtype = call.out_dtype;
    linear(part, 1);
  };
  parallel(threads, count * pieces, work);
}

}  // namespace
