// Paged causal attention; sums in fp32.
//
// Keys are read in tiles of kTile positions at fixed places, [0, 64), [64, 128) and so on, with an online softmax
// (Milakov and Gimelshein 2018) over the tiles of a span of kSpan positions; spans are joined in order. What a
// query gets is therefore bitwise the same alone, in a batch, in a prompt chunk of any length, and however the
// work is split over threads.
//
// With `selected`, a query sees the positions named for it and no others: their keys are copied together, a tile at a
// time, and the place of a position is its place in that list. A query for which all positions up to its own are
// selected gets the same bits as without. Packed rows are unpacked into such a tile too.
//
// A task is one sequence's KV head, a few of its new tokens (all query heads of the group: `rows`), and a range
// of spans. Where there are too few tasks for the threads (a long decode), each span is a task of its own, and
// the last to finish a query joins them.

namespace {

struct Item {
  int32_t sequence, first_token, num_tokens, head;
};

// Positions that some of an item's tokens see (places in the list of its one token, if positions are selected).
struct Reach {
  int64_t low, high;
};

Reach reach_of(const AttendCall& call, const Item& item) {
  if (call.selected != nullptr) {
    return {0, call.selected_counts[call.query_starts[item.sequence] + item.first_token]};
  }
  const int64_t start = call.seq_lens[item.sequence] -
                        (call.query_starts[item.sequence + 1] - call.query_starts[item.sequence]) + item.first_token;
  return {call.window ? std::max<int64_t>(call.first, start + 1 - call.window) : call.first, start + item.num_tokens};
}

Keys keys_of(const AttendCall& call, const Item& item) {
  const int64_t token = call.query_starts[item.sequence] + item.first_token;
  return {call, item.sequence, item.head, call.selected ? call.selected + token * call.selected_stride : nullptr};
}

// Memory of a task: queries, scores and two sets of results.
struct Work {
  Rows rows;
  float *highest, *total, *out;  // over all spans

  static size_t nbytes(const AttendCall& call) {
    const int64_t q_padded = whole_pairs(call.width), padded = whole_pairs(call.value_width);
    const bool has_tile = call.selected != nullptr || call.cache_dtype == kPacked || call.cache_dtype == kFloat8;
    const int64_t tile = has_tile ? kTile * std::max(q_padded, padded) : 0;
    return (kMaxRows * (q_padded + 2 * padded + kTile + 4) + tile) * sizeof(float);
  }

  Work(const AttendCall& call, const Item& item, void* memory) {
    float* p = static_cast<float*>(memory);
    const int64_t q_padded = whole_pairs(call.width), padded = whole_pairs(call.value_width);
    const int64_t group = call.heads / call.units;
    const auto take = [&](int64_t n) { return std::exchange(p, p + n); };
    rows = {item.num_tokens * group,
            group,
            reach_of(call, item).high - item.num_tokens,
            q_padded,
            padded,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
    rows.out = take(kMaxRows * padded);
    out = take(kMaxRows * padded);
    float* q = take(kMaxRows * q_padded);
    rows.q = q;
    rows.scores = take(kMaxRows * kTile);
    rows.highest = take(kMaxRows), rows.total = take(kMaxRows), highest = take(kMaxRows), total = take(kMaxRows);
    rows.tile = p;
    const int64_t token = call.query_starts[item.sequence] + item.first_token;
    const float scale = call.scale * gain_of(call.cache_dtype);
    for (int64_t row = 0; row < rows.count; ++row) {
      float* to = q + row * q_padded;
      const int64_t head = item.head * group + row % group;
      load_arranged(call.q, (token + row / group) * call.q_token_stride + head * call.q_head_stride, call.q_dtype,
                    call.width, is_split(call.cache_dtype), to);
      for (int64_t d = 0; d < q_padded; ++d) to[d] *= scale;
    }
  }
};

void store_item(const AttendCall& call, const Item& item, int64_t padded, const float* highest, const float* total,
                float* out) {
  const int64_t group = call.heads / call.units;
  const int64_t token = call.query_starts[item.sequence] + item.first_token;
  const float scale = call.value_scale * gain_of(call.cache_dtype);
  for (int64_t row = 0; row < item.num_tokens * group; ++row) {
    float* from = out + row * padded;
    const float factor = scale / total[row];
    for (int64_t d = 0; d < padded; ++d) from[d] *= factor;
    unarrange(from, padded, is_split(call.cache_dtype));
    const int64_t at = (token + row / group) * call.heads + item.head * group + row % group;
    store_row(call.out, at * call.value_width, call.q_dtype, call.value_width, from);
    if (call.log_sums != nullptr) call.log_sums[at] = highest[row] + std::log(total[row]);
  }
}

template <typename T>
void attend_item(const AttendCall& call, const Item& item) {
  Work work(call, item, thread_arena()->get(Work::nbytes(call)));
  const Keys keys = keys_of(call, item);
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
  store_item(call, item, work.rows.padded, highest, total, out);
}

// One span of one item, as a task. Results of all spans lie side by side: [spans][out | highest | total].
template <typename T>
void attend_split(const AttendCall& call, const Item& item, int64_t span, float* result) {
  Work work(call, item, thread_arena()->get(Work::nbytes(call)));
  const Reach reach = reach_of(call, item);
  const int64_t rows = work.rows.count, padded = work.rows.padded;
  work.rows.out = result, work.rows.highest = result + rows * padded, work.rows.total = work.rows.highest + rows;
  attend_span<T>(keys_of(call, item), work.rows, std::max(reach.low, span * kSpan),
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
  const int64_t tokens = call.selected ? 1 : std::max<int64_t>(1, kMaxRows / group);
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
  const int64_t padded = whole_pairs(call.value_width), group = call.heads / call.units;
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
    store_item(call, item, padded, highest, total, out);
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
  if (call.cache_dtype == kPacked) return attend_of<Packed>(call, threads);
  if (call.cache_dtype == kFloat8) return attend_of<Float8>(call, threads);
  attend_of<Half>(call, threads);
}

}  // namespace
