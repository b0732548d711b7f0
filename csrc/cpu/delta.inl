// Gated delta net between its projections: convolution, gates, the gated delta rule, norm and output gate.
//
// The rule runs token by token over a few columns of one head's state at a time: those stay in the L1 cache, and
// a token costs one load, one store and four products of each number in them. That is what the chunked form costs
// as well, and so a result has the same bits however the tokens are cut into steps and whatever else is in them.
//
// The tokens of a step go through in tiles whose intermediate rows stay in the L2 cache.

namespace {

#if defined(ND_ISA_AVX512)
constexpr int kRuleVectors = 4;
#else
constexpr int kRuleVectors = 2;
#endif
constexpr int64_t kRuleColumns = kRuleVectors * F::W;
constexpr int64_t kTileFloats = 1 << 18;  // of intermediate rows
constexpr float kUnitEps = 1e-6f;         // of the length of queries and keys

struct DeltaPiece {
  int64_t seq, first, count;  // tokens of the step; all of one sequence
};

// Sizes that follow from a call; rows of a tile are padded so that loads of whole vectors stay inside.
struct DeltaShape {
  int64_t heads, unit, row, gates, values;

  explicit DeltaShape(const DeltaCall& c)
      : heads(c.units * c.per_unit),
        unit(2 * c.key_width + c.per_unit * c.value_width),
        row(whole_pairs(unit) + kRuleColumns),
        gates(2 * heads),
        values(heads * c.value_width) {}
  int64_t token_floats(int64_t units) const { return units * row + gates + values; }
};

float sum_of_squares(const float* x, int64_t n) {
  V sum = F::zero();
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) sum = F::fma(F::load(x + i), F::load(x + i), sum);
  float rest = 0.0f;
  for (; i < n; ++i) rest += x[i] * x[i];
  return F::sum(sum) + rest;
}

void scale_row(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; ++i) x[i] *= by;
}

// The queries, keys and values of key head `unit` for one token, side by side as floats.
void load_unit(const DeltaCall& c, int64_t token, int64_t unit, float* out) {
  const int64_t at = token * c.token_stride, values = c.per_unit * c.value_width;
  load_row(c.q, at + unit * c.qk_unit_stride, c.dtype, c.key_width, out);
  load_row(c.k, at + unit * c.qk_unit_stride, c.dtype, c.key_width, out + c.key_width);
  load_row(c.v, at + unit * c.v_unit_stride, c.dtype, values, out + 2 * c.key_width);
}

int64_t conv_at(const DeltaCall& c, int64_t seq, int64_t part, int64_t unit) {
  return c.blocks[seq] * c.conv_block_stride + part * c.conv_part_stride + unit * c.conv_unit_stride;
}

// rows[t * units * row]: q and k of unit length, q scaled, and v; keep and beta of the unit's value heads.
void delta_inputs(const DeltaCall& c, const DeltaShape& s, const DeltaPiece& piece, int64_t unit, float* rows,
                  float* keep, float* beta) {
  const int64_t before = c.conv_width - 1, padded = whole_pairs(s.unit);
  float* taps =
      static_cast<float*>(thread_arena()->get((c.conv_width + before + piece.count) * padded * sizeof(float)));
  float* raw = taps + c.conv_width * padded;
  std::memset(taps, 0, (c.conv_width + before + piece.count) * padded * sizeof(float));
  for (int64_t w = 0; w < c.conv_width; ++w) {
    std::memcpy(taps + w * padded, c.taps + (unit * c.conv_width + w) * s.unit, s.unit * sizeof(float));
  }
  const int64_t start = c.query_starts[piece.seq];
  for (int64_t j = 0; j < before + piece.count; ++j) {
    const int64_t token = piece.first - before + j;
    if (token >= start) {
      load_unit(c, token, unit, raw + j * padded);
    } else {
      load_row(c.conv, conv_at(c, piece.seq, token - start + before, unit), c.dtype, s.unit, raw + j * padded);
    }
  }
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(c.key_width));
  for (int64_t t = 0; t < piece.count; ++t) {
    float* out = rows + t * c.units * s.row;
    for (int64_t i = 0; i < padded; i += F::W) {
      V sum = F::mul(F::load(raw + t * padded + i), F::load(taps + i));
      for (int64_t w = 1; w < c.conv_width; ++w) {
        sum = F::fma(F::load(raw + (t + w) * padded + i), F::load(taps + w * padded + i), sum);
      }
      F::store(out + i, F::div(sum, one_and_exp_of_minus(sum)));
    }
    float* k = out + c.key_width;
    scale_row(out, c.key_width, q_scale / std::sqrt(sum_of_squares(out, c.key_width) + kUnitEps));
    scale_row(k, c.key_width, 1.0f / std::sqrt(sum_of_squares(k, c.key_width) + kUnitEps));
    const int64_t at = (piece.first + t) * c.token_stride + unit * c.gate_unit_stride;
    for (int64_t i = 0; i < c.per_unit; ++i) {
      const int64_t head = unit * c.per_unit + i;
      float a, b;
      load_row(c.a, at + i, c.dtype, 1, &a);
      load_row(c.b, at + i, c.dtype, 1, &b);
      const float x = a + c.dt_bias[head];
      const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
      keep[t * s.heads + head] = std::exp(c.rate[head] * softplus);
      beta[t * s.heads + head] = 1.0f / (1.0f + std::exp(-b));
    }
  }
}

// The rule for tokens of one head over kRuleColumns columns of its state, whose rows are `stride` apart.
void delta_rule(const DeltaCall& c, const DeltaShape& s, int64_t count, const float* q, const float* v,
                const float* keep, const float* beta, float* state, int64_t stride, float* out, int64_t out_stride) {
  constexpr int N = kRuleVectors;
  const int64_t width = c.key_width, token_stride = c.units * s.row;
  const float* k = q + width;
  V said[N];
  for (int n = 0; n < N; ++n) said[n] = F::zero();
  for (int64_t i = 0; i < width; ++i) {
    const V ki = F::set1(k[i]);
    for (int n = 0; n < N; ++n) said[n] = F::fma(ki, F::load(state + i * stride + n * F::W), said[n]);
  }
  for (int64_t t = 0; t < count; ++t, q += token_stride, k += token_stride, v += token_stride, out += out_stride) {
    const V kept = F::set1(keep[t * s.heads]), forget = F::set1(-keep[t * s.heads]), b = F::set1(beta[t * s.heads]);
    V u[N], read[N];
    for (int n = 0; n < N; ++n) {
      u[n] = F::mul(F::fma(forget, said[n], F::load(v + n * F::W)), b);
      read[n] = said[n] = F::zero();
    }
    const float* next = t + 1 < count ? k + token_stride : k;
    for (int64_t i = 0; i < width; ++i) {
      const V ki = F::set1(k[i]), qi = F::set1(q[i]), after = F::set1(next[i]);
      float* row = state + i * stride;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const V x = F::fma(ki, u[n], F::mul(kept, F::load(row + n * F::W)));
        F::store(row + n * F::W, x);
        read[n] = F::fma(qi, x, read[n]);
        said[n] = F::fma(after, x, said[n]);
      }
    }
    for (int n = 0; n < N; ++n) F::store(out + n * F::W, read[n]);
  }
}

// The same for `columns` of them, fewer than a panel has: on copies filled up with zeros.
void delta_rule_part(const DeltaCall& c, const DeltaShape& s, int64_t count, const float* q, const float* v,
                     const float* keep, const float* beta, float* state, int64_t stride, int64_t columns, float* out,
                     int64_t out_stride) {
  const int64_t floats = (c.key_width + count) * kRuleColumns;
  float* copy = static_cast<float*>(thread_arena()->get(floats * sizeof(float)));
  float* result = copy + c.key_width * kRuleColumns;
  std::memset(copy, 0, c.key_width * kRuleColumns * sizeof(float));
  for (int64_t i = 0; i < c.key_width; ++i) {
    std::memcpy(copy + i * kRuleColumns, state + i * stride, columns * sizeof(float));
  }
  delta_rule(c, s, count, q, v, keep, beta, copy, kRuleColumns, result, kRuleColumns);
  for (int64_t i = 0; i < c.key_width; ++i) {
    std::memcpy(state + i * stride, copy + i * kRuleColumns, columns * sizeof(float));
  }
  for (int64_t t = 0; t < count; ++t) {
    std::memcpy(out + t * out_stride, result + t * kRuleColumns, columns * sizeof(float));
  }
}

// out = norm(x) * weight * silu(z), for all heads of a token.
void delta_output(const DeltaCall& c, const DeltaShape& s, int64_t token, const float* x) {
  const int64_t padded = whole_pairs(c.value_width);
  float* weight = static_cast<float*>(thread_arena()->get(3 * padded * sizeof(float)));
  float *z = weight + padded, *y = z + padded;
  std::memset(weight, 0, 3 * padded * sizeof(float));
  load_row(c.weight, 0, c.dtype, c.value_width, weight);
  for (int64_t head = 0; head < s.heads; ++head, x += c.value_width) {
    const int64_t unit = head / c.per_unit, at = head % c.per_unit * c.value_width;
    load_row(c.z, token * c.token_stride + unit * c.z_unit_stride + at, c.dtype, c.value_width, z);
    std::memcpy(y, x, c.value_width * sizeof(float));
    const float mean = sum_of_squares(x, c.value_width) / static_cast<float>(c.value_width);
    const V scale = F::set1(1.0f / std::sqrt(mean + c.eps));
    for (int64_t i = 0; i < padded; i += F::W) {
      const V g = F::load(z + i);
      const V normed = F::mul(F::mul(F::load(y + i), scale), F::load(weight + i));
      F::store(y + i, F::mul(normed, F::div(g, one_and_exp_of_minus(g))));
    }
    store_row(c.out, token * s.values + head * c.value_width, c.dtype, c.value_width, y);
  }
}

// What the convolution keeps of a sequence after the step: its last inputs, of which some may have been there before.
void keep_inputs(const DeltaCall& c, const DeltaShape& s, int64_t seq, int64_t unit) {
  const int64_t start = c.query_starts[seq], end = c.query_starts[seq + 1], before = c.conv_width - 1;
  float* row = static_cast<float*>(thread_arena()->get(s.unit * sizeof(float)));
  for (int64_t j = 0; j < before; ++j) {
    const int64_t token = end - before + j;
    if (token >= start) {
      load_unit(c, token, unit, row);
    } else {
      load_row(c.conv, conv_at(c, seq, token - start + before, unit), c.dtype, s.unit, row);
    }
    store_row(c.conv, conv_at(c, seq, j, unit), c.dtype, s.unit, row);
  }
}

void delta_net(const DeltaCall& c, int threads) {
  const DeltaShape s(c);
  const int64_t tokens = c.query_starts[c.num_seqs];
  const int64_t tile = std::min(tokens, std::max<int64_t>(16, kTileFloats / s.token_floats(c.units)));
  const int64_t panels = (c.value_width + kRuleColumns - 1) / kRuleColumns;
  Arena* arena = thread_arena(kAroundTasks);
  const int64_t floats = (tile * s.token_floats(c.units) + kRuleColumns + 1) / 2 * 2;
  float* rows = static_cast<float*>(arena->get(floats * sizeof(float) + tile * sizeof(DeltaPiece)));
  float *keep = rows + tile * c.units * s.row, *beta = keep + tile * s.heads, *out = beta + tile * s.heads;
  DeltaPiece* pieces = reinterpret_cast<DeltaPiece*>(rows + floats);
  int64_t seq = 0;
  for (int64_t begin = 0; begin < tokens; begin += tile) {
    const int64_t end = std::min(tokens, begin + tile);
    int64_t count = 0;
    for (int64_t first = begin; first < end; first = pieces[count - 1].first + pieces[count - 1].count) {
      while (c.query_starts[seq + 1] <= first) ++seq;
      pieces[count++] = {seq, first, std::min<int64_t>(end, c.query_starts[seq + 1]) - first};
    }
    const int used = (end - begin) * s.values * c.key_width > 65536 ? threads : 1;
    parallel(used, count * c.units, [&](int64_t task) {
      const DeltaPiece& piece = pieces[task / c.units];
      const int64_t unit = task % c.units, at = piece.first - begin;
      delta_inputs(c, s, piece, unit, rows + (at * c.units + unit) * s.row, keep + at * s.heads, beta + at * s.heads);
    });
    parallel(used, count * s.heads * panels, [&](int64_t task) {
      const DeltaPiece& piece = pieces[task / (s.heads * panels)];
      const int64_t head = task / panels % s.heads, column = task % panels * kRuleColumns, at = piece.first - begin;
      const float* q = rows + (at * c.units + head / c.per_unit) * s.row;
      const float* v = q + 2 * c.key_width + head % c.per_unit * c.value_width + column;
      float* state = c.state + c.blocks[piece.seq] * c.state_block_stride + head * c.state_head_stride + column;
      float* result = out + at * s.values + head * c.value_width + column;
      const float *kept = keep + at * s.heads + head, *strength = beta + at * s.heads + head;
      const int64_t columns = std::min(kRuleColumns, c.value_width - column);
      if (columns == kRuleColumns) {
        delta_rule(c, s, piece.count, q, v, kept, strength, state, c.value_width, result, s.values);
      } else {
        delta_rule_part(c, s, piece.count, q, v, kept, strength, state, c.value_width, columns, result, s.values);
      }
    });
    parallel(used, end - begin, [&](int64_t t) { delta_output(c, s, begin + t, out + t * s.values); });
  }
  parallel(c.num_seqs * c.units * s.unit > 65536 ? threads : 1, c.num_seqs * c.units,
           [&](int64_t task) { keep_inputs(c, s, task / c.units, task % c.units); });
}

}  // namespace
