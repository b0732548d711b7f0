// Paged causal attention; sums in fp32.
//
// Keys are read in tiles of kTile positions at fixed places, [0, 64), [64, 128) and so on, with an online softmax
// (Milakov and Gimelshein 2018) over the tiles of a span of kSpan positions; spans are joined in order. What a
// query gets is therefore bitwise the same alone, in a batch, in a prompt chunk of any length, and however the
// work is split over threads.
//
// A task is one sequence's KV head, a few of its new tokens (all query heads of the group: `rows`), and a range
// of spans. Where there are too few tasks for the threads (a long decode), each span is a task of its own, and
// the last to finish a query joins them.

namespace {

constexpr int kTile = 64;
constexpr int64_t kSpan = 512;  // a multiple of kTile
constexpr int64_t kMaxRows = 48;
constexpr float kNone = -1e30f;  // highest score of a row that has seen nothing
#if defined(ND_ISA_AVX512)
constexpr int kKeysN = 4;
#else
constexpr int kKeysN = 2;
#endif
constexpr int kKeysM = 4;

struct Rows {
  int64_t count;           // tokens * group
  int64_t group;           // query heads per KV head
  int64_t first_position;  // of the first token
  int64_t padded;          // head width in whole pairs
  const float* q;          // [count, padded], arranged and scaled
  float* scores;           // [count, kTile]
  float* highest;          // [count]
  float* total;            // [count]
  float* out;              // [count, padded], arranged

  int64_t position(int64_t row) const { return first_position + row / group; }
};

struct Keys {
  const AttendCall& call;
  int64_t sequence, head;

  // Keys (part 0) or values (part 1) of a position; block-mates follow at token_stride.
  template <typename T>
  const T* at(int part, int64_t position) const {
    const int64_t block = call.block_tables[sequence * call.table_stride + position / call.block_size];
    return static_cast<const T*>(call.cache) + block * call.block_stride + part * call.part_stride +
           head * call.unit_stride + position % call.block_size * call.token_stride;
  }

  // Calls body(first, count) for the runs of [low, high) that lie in one block each.
  template <typename Body>
  void runs(int64_t low, int64_t high, Body&& body) const {
    while (low < high) {
      const int64_t end = std::min(high, (low / call.block_size + 1) * call.block_size);
      body(low, end - low);
      low = end;
    }
  }
};

template <typename T, int MT, int NT>
void score_tile(const Rows& rows, int64_t row, const T* keys, int64_t stride, int64_t width, float* scores) {
  float sums[MT * NT];
  tile_sums<T, MT, NT>(rows.q + row * rows.padded, rows.padded, keys, stride, width, sums);
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < NT; ++j) scores[(row + i) * kTile + j] = sums[i * NT + j];
  }
}

// scores[row, column + j] = q . key j of a run.
template <typename T>
void score_run(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t width, int64_t column) {
  for (int64_t row = 0; row < rows.count;) {
    const int64_t left = rows.count - row;
    const int64_t mt = left >= kKeysM ? kKeysM : left;
    int64_t j = 0;
    for (; j < count; j += j + kKeysN <= count ? kKeysN : 1) {
      const T* key = keys + j * stride;
      float* to = rows.scores + column + j;
      if (j + kKeysN <= count) {
        if (mt == 4) score_tile<T, 4, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 3) score_tile<T, 3, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 2) score_tile<T, 2, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 1) score_tile<T, 1, kKeysN>(rows, row, key, stride, width, to);
      } else {
        for (int64_t i = 0; i < mt; ++i) score_tile<T, 1, 1>(rows, row + i, key, stride, width, to);
      }
    }
    row += mt;
  }
}

// out[row] += scores[row, column + j] * value j of a run, MT rows and one pair of the width.
template <typename T, int MT>
void mix_pair(const Rows& rows, int64_t row, const T* values, int64_t stride, int64_t count, int64_t column, int64_t d,
              int64_t valid) {
  V acc[MT][2];
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    acc[m][0] = F::load(rows.out + (row + m) * rows.padded + d);
    acc[m][1] = F::load(rows.out + (row + m) * rows.padded + d + F::W);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values + j * stride + d;
    T rest[kPair];
    if (valid < kPair) {
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest, value, valid * sizeof(T));
      value = rest;
    }
    const V v0 = Element<T>::pair0(value), v1 = Element<T>::pair1(value);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const V p = F::set1(rows.scores[(row + m) * kTile + column + j]);
      acc[m][0] = F::fma(p, v0, acc[m][0]);
      acc[m][1] = F::fma(p, v1, acc[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    F::store(rows.out + (row + m) * rows.padded + d, acc[m][0]);
    F::store(rows.out + (row + m) * rows.padded + d + F::W, acc[m][1]);
  }
}

template <typename T>
void mix_run(const Rows& rows, const T* values, int64_t stride, int64_t count, int64_t width, int64_t column) {
  for (int64_t row = 0; row < rows.count;) {
    const int64_t left = rows.count - row;
    const int64_t mt = left >= 4 ? 4 : left;
    for (int64_t d = 0; d < width; d += kPair) {
      const int64_t valid = std::min<int64_t>(kPair, width - d);
      if (mt == 4) mix_pair<T, 4>(rows, row, values, stride, count, column, d, valid);
      if (mt == 3) mix_pair<T, 3>(rows, row, values, stride, count, column, d, valid);
      if (mt == 2) mix_pair<T, 2>(rows, row, values, stride, count, column, d, valid);
      if (mt == 1) mix_pair<T, 1>(rows, row, values, stride, count, column, d, valid);
    }
    row += mt;
  }
}

// Scores become weights: exp(score - highest), zero for what a row does not see; out and total are rescaled.
// `first` is the tile's first position; columns [low, high) of it hold scores.
void soften(const Rows& rows, int64_t first, int64_t low, int64_t high, int64_t window) {
  for (int64_t row = 0; row < rows.count; ++row) {
    float* scores = rows.scores + row * kTile;
    const int64_t position = rows.position(row);
    const int64_t seen_low = window ? std::max(low, position + 1 - window - first) : low;
    const int64_t seen_high = std::min(high, position + 1 - first);
    for (int64_t i = 0; i < std::min<int64_t>(seen_low, kTile); ++i) scores[i] = -INFINITY;
    for (int64_t i = std::max<int64_t>(seen_high, 0); i < kTile; ++i) scores[i] = -INFINITY;
    V top = F::load(scores);
    for (int i = F::W; i < kTile; i += F::W) top = F::max(top, F::load(scores + i));
    const float highest = std::max(rows.highest[row], F::largest(top));
    const V shift = F::set1(-highest);
    V sum = F::zero();
    for (int i = 0; i < kTile; i += F::W) {
      const V p = exp_v(F::add(F::load(scores + i), shift));
      F::store(scores + i, p);
      sum = F::add(sum, p);
    }
    float decay;
    {
      float lanes[F::W];
      F::store(lanes, exp_v(F::set1(rows.highest[row] - highest)));
      decay = lanes[0];
    }
    rows.highest[row] = highest;
    rows.total[row] = rows.total[row] * decay + F::sum(sum);
    if (decay != 1.0f) {
      float* out = rows.out + row * rows.padded;
      for (int64_t d = 0; d < rows.padded; d += F::W) F::store(out + d, F::mul(F::load(out + d), F::set1(decay)));
    }
  }
}

// Blocks lie anywhere, so the processor does not foresee the next one.
template <typename T>
void prefetch_run(const T* rows, int64_t stride, int64_t count) {
  const char* p = reinterpret_cast<const char*>(rows);
  for (int64_t i = 0; i < count * stride * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Attention of `rows` over positions [low, high) of one span, from nothing.
template <typename T>
void attend_span(const Keys& keys, const Rows& rows, int64_t low, int64_t high) {
  const AttendCall& call = keys.call;
  for (int64_t row = 0; row < rows.count; ++row) rows.highest[row] = kNone, rows.total[row] = 0.0f;
  std::memset(rows.out, 0, rows.count * rows.padded * sizeof(float));
  for (int64_t first = low / kTile * kTile; first < high; first += kTile) {
    const int64_t from = std::max(low, first), to = std::min(high, first + kTile);
    keys.runs(from, to, [&](int64_t position, int64_t count) {
      prefetch_run(keys.at<T>(1, position), call.token_stride, count);
      score_run<T>(rows, keys.at<T>(0, position), call.token_stride, count, call.width, position - first);
    });
    soften(rows, first, from - first, to - first, call.window);
    keys.runs(from, to, [&](int64_t position, int64_t count) {
      if (position + kTile < high) prefetch_run(keys.at<T>(0, position + kTile), call.token_stride, count);
      mix_run<T>(rows, keys.at<T>(1, position), call.token_stride, count, call.width, position - first);
    });
  }
}

// Adds one span's result to what the spans before it gave.
void join(int64_t count, int64_t padded, float* highest, float* total, float* out, const float* span_highest,
          const float* span_total, const float* span_out) {
  for (int64_t row = 0; row < count; ++row) {
    const float top = std::max(highest[row], span_highest[row]);
    float lanes[F::W];
    F::store(lanes, exp_v(F::set1(highest[row] - top)));
    const float a = lanes[0];
    F::store(lanes, exp_v(F::set1(span_highest[row] - top)));
    const float b = lanes[0];
    highest[row] = top;
    total[row] = total[row] * a + span_total[row] * b;
    for (int64_t d = row * padded; d < (row + 1) * padded; d += F::W) {
      F::store(out + d, F::fma(F::load(span_out + d), F::set1(b), F::mul(F::load(out + d), F::set1(a))));
    }
  }
}

struct Item {
  int32_t sequence, first_token, num_tokens, head;
};

// Positions that some of an item's tokens see.
struct Reach {
  int64_t low, high;
};

Reach reach_of(const AttendCall& call, const Item& item) {
  const int64_t start = call.seq_lens[item.sequence] -
                        (call.query_starts[item.sequence + 1] - call.query_starts[item.sequence]) + item.first_token;
  return {call.window ? std::max<int64_t>(0, start + 1 - call.window) : 0, start + item.num_tokens};
}

// Memory of a task: queries, scores and two sets of results.
struct Work {
  Rows rows;
  float *highest, *total, *out;  // over all spans

  static size_t nbytes(const AttendCall& call) {
    const int64_t padded = whole_pairs(call.width);
    return (kMaxRows * (3 * padded + kTile + 4)) * sizeof(float);
  }

  Work(const AttendCall& call, const Item& item, void* memory) {
    float* p = static_cast<float*>(memory);
    const int64_t padded = whole_pairs(call.width), group = call.heads / call.units;
    const auto take = [&](int64_t n) { return std::exchange(p, p + n); };
    rows = {item.num_tokens * group,
            group,
            reach_of(call, item).high - item.num_tokens,
            padded,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
    rows.out = take(kMaxRows * padded);
    out = take(kMaxRows * padded);
    float* q = take(kMaxRows * padded);
    rows.q = q;
    rows.scores = take(kMaxRows * kTile);
    rows.highest = take(kMaxRows), rows.total = take(kMaxRows), highest = take(kMaxRows), total = take(kMaxRows);
    const int64_t token = call.query_starts[item.sequence] + item.first_token;
    for (int64_t row = 0; row < rows.count; ++row) {
      float* to = q + row * padded;
      const int64_t head = item.head * group + row % group;
      load_arranged(call.q, (token + row / group) * call.q_token_stride + head * call.q_head_stride, call.q_dtype,
                    call.width, call.cache_dtype == kBfloat16, to);
      for (int64_t d = 0; d < padded; ++d) to[d] *= call.scale;
    }
  }
};

void store_item(const AttendCall& call, const Item& item, int64_t padded, const float* total, float* out) {
  const int64_t group = call.heads / call.units;
  const int64_t token = call.query_starts[item.sequence] + item.first_token;
  for (int64_t row = 0; row < item.num_tokens * group; ++row) {
    float* from = out + row * padded;
    const float inverse = 1.0f / total[row];
    for (int64_t d = 0; d < padded; ++d) from[d] *= inverse;
    unarrange(from, padded, call.cache_dtype == kBfloat16);
    const int64_t head = item.head * group + row % group;
    store_row(call.out, ((token + row / group) * call.heads + head) * call.width, call.q_dtype, call.width, from);
  }
}

template <typename T>
void attend_item(const AttendCall& call, const Item& item) {
  Work work(call, item, thread_arena()->get(Work::nbytes(call)));
  const Keys keys{call, item.sequence, item.head};
  const Reach reach = reach_of(call, item);
  float *highest = work.rows.highest, *total = work.rows.total, *out = work.rows.out;
  for (int64_t span = reach.low / kSpan; span * kSpan < reach.high; ++span) {
    attend_span<T>(keys, work.rows, std::max(reach.low, span * kSpan), std::min(reach.high, (span + 1) * kSpan));
    if (span == reach.low / kSpan) {  // keep the first, give the others the second set
      std::swap(work.rows.highest, work.highest), std::swap(work.rows.total, work.total);
      std::swap(work.rows.out, work.out);
      continue;
    }
    join(work.rows.count, work.rows.padded, highest, total, out, work.rows.highest, work.rows.total, work.rows.out);
  }
  store_item(call, item, work.rows.padded, total, out);
}

// One span of one item, as a task. Results of all spans lie side by side: [spans][out | highest | total].
template <typename T>
void attend_split(const AttendCall& call, const Item& item, int64_t span, float* result) {
  Work work(call, item, thread_arena()->get(Work::nbytes(call)));
  const Reach reach = reach_of(call, item);
  const int64_t rows = work.rows.count, padded = work.rows.padded;
  work.rows.out = result, work.rows.highest = result + rows * padded, work.rows.total = work.rows.highest + rows;
  attend_span<T>({call, item.sequence, item.head}, work.rows, std::max(reach.low, span * kSpan),
                 std::min(reach.high, (span + 1) * kSpan));
}

struct Plan {
  Item* items;
  int64_t num_items;
  int64_t num_spans;  // over all items
  int64_t max_spans;  // of one item
};

Plan plan_items(const AttendCall& call) {
  const int64_t group = call.heads / call.units;
  const int64_t tokens = std::max<int64_t>(1, kMaxRows / group);
  int64_t capacity = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    capacity += (call.query_starts[s + 1] - call.query_starts[s] + tokens - 1) / tokens * call.units;
  }
  Plan plan{static_cast<Item*>(thread_arena(kAroundTasks)->get(capacity * sizeof(Item) + 64)), 0, 0, 0};
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t count = call.query_starts[s + 1] - call.query_starts[s];
    for (int64_t t = (count - 1) / tokens * tokens; t >= 0 && count > 0; t -= tokens) {  // longest first
      for (int64_t u = 0; u < call.units; ++u) {
        const Item item{static_cast<int32_t>(s), static_cast<int32_t>(t),
                        static_cast<int32_t>(std::min(tokens, count - t)), static_cast<int32_t>(u)};
        const Reach reach = reach_of(call, item);
        const int64_t spans = (reach.high - 1) / kSpan - reach.low / kSpan + 1;
        plan.items[plan.num_items++] = item;
        plan.num_spans += spans;
        plan.max_spans = std::max(plan.max_spans, spans);
      }
    }
  }
  return plan;
}

template <typename T>
void attend_splits(const AttendCall& call, const Plan& plan, int threads) {
  struct Split {
    int32_t item, span;
    float* result;
  };
  const int64_t padded = whole_pairs(call.width), group = call.heads / call.units;
  size_t floats = 0;
  for (int64_t i = 0; i < plan.num_items; ++i) {
    const Reach reach = reach_of(call, plan.items[i]);
    floats += ((reach.high - 1) / kSpan - reach.low / kSpan + 1) * plan.items[i].num_tokens * group * (padded + 2);
  }
  char* memory = static_cast<char*>(thread_arena(kBetweenTasks)->get(plan.num_spans * sizeof(Split) + floats * 4 + 64));
  Split* splits = reinterpret_cast<Split*>(memory);
  float* results = reinterpret_cast<float*>(memory + (plan.num_spans * sizeof(Split) + 63) / 64 * 64);
  int64_t n = 0;
  for (int64_t i = 0; i < plan.num_items; ++i) {
    const Reach reach = reach_of(call, plan.items[i]);
    for (int64_t span = reach.low / kSpan; span * kSpan < reach.high; ++span) {
      splits[n++] = {static_cast<int32_t>(i), static_cast<int32_t>(span), results};
      results += plan.items[i].num_tokens * group * (padded + 2);
    }
  }
  const auto span_task = [&](int64_t k) {
    attend_split<T>(call, plan.items[splits[k].item], splits[k].span, splits[k].result);
  };
  parallel(threads, n, span_task);
  for (int64_t k = 0; k < n;) {
    const Item& item = plan.items[splits[k].item];
    const int64_t rows = item.num_tokens * group;
    float* out = splits[k].result;
    float *highest = out + rows * padded, *total = highest + rows;
    int64_t next = k + 1;
    for (; next < n && splits[next].item == splits[k].item; ++next) {
      const float* other = splits[next].result;
      join(rows, padded, highest, total, out, other + rows * padded, other + rows * padded + rows, other);
    }
    store_item(call, item, padded, total, out);
    k = next;
  }
}

template <typename T>
void attend_of(const AttendCall& call, int threads) {
  const Plan plan = plan_items(call);
  if (plan.max_spans > 1 && plan.num_items < 4 * threads) return attend_splits<T>(call, plan, threads);
  const auto task = [&](int64_t i) { attend_item<T>(call, plan.items[i]); };
  parallel(threads, plan.num_items, task);
}

void attend(const AttendCall& call, int threads) {
  if (call.cache_dtype == kFloat32) return attend_of<float>(call, threads);
  if (call.cache_dtype == kBfloat16) return attend_of<Bfloat>(call, threads);
  attend_of<Half>(call, threads);
}

}  // namespace
