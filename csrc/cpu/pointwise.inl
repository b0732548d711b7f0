// The small operations between matrix products, one pass each, computed in fp32 and rounded once; and the write of
// new keys and values.

namespace {

// Runs body(row, scratch) for all rows, on threads if there is enough to do. `scratch`: `floats` of this task.
template <typename Body>
void each_row(int threads, int64_t rows, int64_t width, int64_t floats, Body&& body) {
  constexpr int64_t kFew = 32768;  // elements that one thread does before another would have woken up
  const int64_t run = std::max<int64_t>(1, kFew / 4 / width);
  const auto work = [&](int64_t task) {
    float* scratch = static_cast<float*>(thread_arena()->get(floats * sizeof(float)));
    for (int64_t row = task * run; row < std::min(rows, (task + 1) * run); ++row) body(row, scratch);
  };
  parallel(rows * width > kFew ? threads : 1, (rows + run - 1) / run, work);
}

void rms_norm(const NormCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width);
  each_row(threads, call.tokens * call.heads, call.width, 2 * padded, [&](int64_t row, float* x) {
    const int64_t token = row / call.heads, head = row % call.heads;
    float* weight = x + padded;
    load_row(call.x, token * call.x_token_stride + head * call.x_head_stride, call.x_dtype, call.width, x);
    load_row(call.weight, head < call.split ? 0 : call.weight_stride, call.weight_dtype, call.width, weight);
    for (int64_t i = call.width; i < padded; ++i) x[i] = weight[i] = 0.0f;
    V squares = F::zero();
    for (int64_t i = 0; i < padded; i += F::W) squares = F::fma(F::load(x + i), F::load(x + i), squares);
    const V scale = F::set1(1.0f / std::sqrt(F::sum(squares) / static_cast<float>(call.width) + call.eps));
    for (int64_t i = 0; i < padded; i += F::W) {
      F::store(x + i, F::mul(F::mul(F::load(x + i), scale), F::load(weight + i)));
    }
    store_row(call.out, row * call.width, call.x_dtype, call.width, x);
  });
}

// A function of its own: the compiler must know that these do not overlap.
void turn(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, float* __restrict out,
          int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] + x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}

void rope(const RopeCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width), half = call.width / 2;
  const int64_t rows = call.interleaved ? 5 : 4;
  each_row(threads, call.tokens, call.heads * call.width, rows * padded, [&](int64_t token, float* cos) {
    float *sin = cos + padded, *x = sin + padded, *out = x + padded;
    load_row(call.cos, token * call.table_stride, call.table_dtype, call.width, cos);
    load_row(call.sin, token * call.table_stride, call.table_dtype, call.width, sin);
    for (int64_t head = 0; head < call.heads; ++head) {
      const int64_t from = token * call.x_token_stride + head * call.x_head_stride;
      load_row(call.x, from, call.x_dtype, call.width, call.interleaved ? out + padded : x);
      if (call.interleaved) {
        const float* pairs = out + padded;
        for (int64_t i = 0; i < half; ++i) x[i] = pairs[2 * i], x[i + half] = pairs[2 * i + 1];
      }
      turn(x, cos, sin, out, half);
      store_row(call.out, token * call.out_token_stride + head * call.out_head_stride, call.x_dtype, call.width, out);
    }
  });
}

V one_and_exp_of_minus(V x) { return F::add(exp_v(F::min(F::mul(x, F::set1(-1.0f)), F::set1(88.0f))), F::set1(1.0f)); }

// NaN stays what it is: these instructions give their second operand for it.
V at_most(V x, float limit) { return F::min(F::set1(limit), x); }

void silu_mul(const GateCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width);
  each_row(threads, call.tokens, call.width, 2 * padded, [&](int64_t token, float* gate) {
    float* up = gate + padded;
    load_row(call.x, token * call.x_stride, call.dtype, call.width, gate);
    load_row(call.x, token * call.x_stride + call.width, call.dtype, call.width, up);
    for (int64_t i = call.width; i < padded; ++i) gate[i] = up[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += F::W) {
      V g = F::load(gate + i), u = F::load(up + i);
      if (call.limit > 0) {
        g = at_most(g, call.limit);
        u = F::mul(at_most(F::mul(at_most(u, call.limit), F::set1(-1.0f)), call.limit), F::set1(-1.0f));
      }
      F::store(gate + i, F::mul(F::div(g, one_and_exp_of_minus(g)), u));
    }
    store_row(call.out, token * call.width, call.dtype, call.width, gate);
  });
}

void sigmoid_mul(const SigmoidCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width);
  each_row(threads, call.tokens, call.width, 2 * padded, [&](int64_t token, float* x) {
    float* gate = x + padded;
    load_row(call.x, token * call.x_stride, call.x_dtype, call.width, x);
    load_row(call.gate, token * call.gate_stride, call.gate_dtype, call.gate_width, gate);
    if (call.gate_width == 1) std::fill(gate + 1, gate + call.width, gate[0]);
    for (int64_t i = call.width; i < padded; ++i) x[i] = gate[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += F::W) {
      F::store(x + i, F::div(F::load(x + i), one_and_exp_of_minus(F::load(gate + i))));
    }
    store_row(call.out, token * call.width, call.x_dtype, call.width, x);
  });
}

void combine(const CombineCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width);
  each_row(threads, call.tokens, call.width * call.top_k, 2 * padded, [&](int64_t token, float* sum) {
    float* y = sum + padded;
    for (int64_t i = 0; i < padded; ++i) sum[i] = y[i] = 0.0f;
    for (int64_t j = token * call.top_k; j < (token + 1) * call.top_k; ++j) {
      load_row(call.y, call.places[j] * call.y_stride, call.dtype, call.width, y);
      const V weight = F::set1(call.weights[j]);
      for (int64_t i = 0; i < padded; i += F::W) {
        F::store(sum + i, F::fma(F::load(y + i), weight, F::load(sum + i)));
      }
    }
    store_row(call.out, token * call.width, call.dtype, call.width, sum);
  });
}

void write_rows(const WriteCall& call, int threads) {
  const auto row = [&](int64_t t) {
    const int64_t block = call.slots[t] / call.block_size, offset = call.slots[t] % call.block_size;
    const size_t nbytes = call.width * (call.dtype == kFloat32 ? 4 : 2);
    for (int part = 0; part < call.parts; ++part) {
      const void* from = part == 0 ? call.k : call.v;
      const int64_t token_stride = part == 0 ? call.k_token_stride : call.v_token_stride;
      const int64_t head_stride = part == 0 ? call.k_head_stride : call.v_head_stride;
      for (int64_t u = 0; u < call.units; ++u) {
        const int64_t source = t * token_stride + u * head_stride;
        const int64_t target =
            block * call.block_stride + part * call.part_stride + u * call.unit_stride + offset * call.token_stride;
        if (call.dtype == call.cache_dtype) {
          const int64_t size = call.dtype == kFloat32 ? 4 : 2;
          std::memcpy(static_cast<char*>(call.cache) + target * size, static_cast<const char*>(from) + source * size,
                      nbytes);
        } else {
          float* floats = static_cast<float*>(thread_arena()->get(call.width * sizeof(float)));
          load_row(from, source, call.dtype, call.width, floats);
          const float scale = part == 0 ? call.k_scale : call.v_scale;
          if (scale != 1.0f) {
            for (int64_t i = 0; i < call.width; ++i) floats[i] /= scale;
          }
          store_row(call.cache, target, call.cache_dtype, call.width, floats);
        }
      }
    }
  };
  parallel(call.num_tokens * call.units * call.width > 65536 ? threads : 1, call.num_tokens, row);
}

}  // namespace
