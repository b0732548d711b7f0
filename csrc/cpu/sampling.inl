// draw_row: one token, as defined in common/kernels/sampling.py.
//
// Truncation leaves a prefix of the order (higher logit, lower id); it is described by its last member
// (`Edge`), so nothing is sorted but the few tokens around it. The race then looks for the largest
// logit / T + g. With v = 1 - u, -ln(u) >= v, hence g <= -ln(v), and log2(v) >= the number made of v's float
// bits: one conversion gives an upper bound of each token's score, and only a token whose bound beats the best
// score so far has its noise computed exactly.

namespace {

constexpr uint64_t kC1 = 0x9E3779B97F4A7C15ull;
constexpr int kBlock = 32;  // tokens that share a maximum
constexpr double kBig = 1e30;

struct Edge {
  float logit;
  int64_t id;
  bool keeps(float x, int64_t i) const { return x > logit || (x == logit && i <= id); }
};

struct Candidate {
  float logit;
  int32_t id;
};

struct Before {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  }
};

struct Higher {
  bool operator()(float a, float b) const { return a > b; }
};

struct Row {
  const float* x;
  int64_t vocab;
  int64_t blocks;
  float* block_max;
  Candidate* candidates;  // room for vocab
  double* weights;        // room for vocab
  float best;
};

inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline double gumbel(uint64_t key, int64_t id) {
  uint64_t word = mix64(key + (static_cast<uint64_t>(id) + 1) * kC1);
  double u = (static_cast<double>(word >> 32) + 0.5) * 0x1p-32;
  return -std::log(-std::log(u));
}

// exp of -708 <= x <= 0 within 2 ulp, without a branch, so that compilers vectorise loops over it.
inline double exp_d(double x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  double shifted = x * 1.4426950408889634 + magic;
  double n = shifted - magic;
  double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return p * scale;
}

inline double weight(float x, float best, double temperature) {
  return exp_d(std::max((static_cast<double>(x) - static_cast<double>(best)) / temperature, -708.0));
}

// weight() of kBlock logits.
inline void weigh_block(const float* x, float best, double temperature, double* out) {
  double z[kBlock];
  for (int j = 0; j < kBlock; ++j) z[j] = (static_cast<double>(x[j]) - static_cast<double>(best)) / temperature;
  for (int j = 0; j < kBlock; ++j) z[j] = z[j] > -708.0 ? z[j] : -708.0;
  for (int j = 0; j < kBlock; ++j) out[j] = exp_d(z[j]);
}

// Fills block_max and best. False if a logit is NaN or +inf.
bool scan(Row* row) {
  bool nan = false;
  float best = -INFINITY;
  for (int64_t b = 0; b < row->blocks; ++b) {
    int64_t first = b * kBlock, last = std::min(first + kBlock, row->vocab);
    float top = -INFINITY;
    int64_t i = first;
    if (last - first == kBlock) {
      V acc = F::load(row->x + i);
      nan |= F::any_nan(acc);
      for (i += F::W; i < last; i += F::W) {
        V v = F::load(row->x + i);
        nan |= F::any_nan(v);
        acc = F::max(acc, v);
      }
      top = F::largest(acc);
    }
    for (; i < last; ++i) {
      nan |= row->x[i] != row->x[i];
      top = row->x[i] > top ? row->x[i] : top;
    }
    row->block_max[b] = top;
    best = top > best ? top : best;
  }
  row->best = best;
  return !nan && best != INFINITY;
}

int64_t first_best(const Row& row) {
  int64_t b = 0;
  while (row.block_max[b] != row.best) ++b;
  int64_t i = b * kBlock;
  while (row.x[i] != row.best) ++i;
  return i;
}

int64_t collect(const Row& row, float floor) {
  int64_t n = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.block_max[b] < floor) continue;
    int64_t last = std::min((b + 1) * kBlock, row.vocab);
    for (int64_t i = b * kBlock; i < last; ++i) {
      row.candidates[n] = {row.x[i], static_cast<int32_t>(i)};
      n += row.x[i] >= floor;
    }
  }
  return n;
}

// Puts the first k of the order, sorted, at the front of `candidates`. `scratch`: room for `blocks`.
void first_k(const Row& row, int64_t k, float* scratch) {
  float floor = -INFINITY;
  if (k < row.blocks) {  // k blocks hold a maximum at least as high as the k-th highest maximum
    std::memcpy(scratch, row.block_max, row.blocks * sizeof(float));
    std::nth_element(scratch, scratch + (k - 1), scratch + row.blocks, Higher());
    floor = scratch[k - 1];
  }
  int64_t n = collect(row, floor);
  if (k < n) std::nth_element(row.candidates, row.candidates + (k - 1), row.candidates + n, Before());
  std::sort(row.candidates, row.candidates + k, Before());
}

void weigh(const Row& row, double temperature) {
  int64_t i = 0;
  for (; i + kBlock <= row.vocab; i += kBlock) weigh_block(row.x + i, row.best, temperature, row.weights + i);
  for (; i < row.vocab; ++i) row.weights[i] = weight(row.x[i], row.best, temperature);
}

// Shortest prefix of sorted candidates that holds `top_p` of their weight.
Edge edge_of_sorted(const Row& row, int64_t n, double temperature, double top_p) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    row.weights[i] = weight(row.candidates[i].logit, row.best, temperature);
    total += row.weights[i];
  }
  double before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n && (i == 0 || before < top_p * total); ++i) {
    before += row.weights[i];
    last = i;
  }
  return {row.candidates[last].logit, row.candidates[last].id};
}

// The same over the whole row: weights are added up by classes of equal distance from the best logit, and only
// the class in which `top_p` is reached is sorted.
Edge edge_of_row(const Row& row, double temperature, double top_p) {
  constexpr int kClasses = 2048;
  constexpr float kPerUnit = 48.0f;  // classes per unit of logit / T; the last takes all beyond
  double sums[kClasses] = {};
  const float scale = static_cast<float>(std::min(kPerUnit / temperature, kBig));
  auto class_of = [&](float x) {
    float d = (row.best - x) * scale;
    return d < kClasses - 1 ? static_cast<int>(d) : kClasses - 1;
  };
  weigh(row, temperature);
  double total = 0;
  for (int64_t i = 0; i < row.vocab; ++i) sums[class_of(row.x[i])] += row.weights[i];
  for (int c = 0; c < kClasses; ++c) total += sums[c];
  double before = 0;
  int edge = 0;
  while (edge < kClasses - 1 && before + sums[edge] < top_p * total) before += sums[edge++];
  int64_t n = 0;
  for (int64_t i = 0; i < row.vocab; ++i) {
    row.candidates[n] = {row.x[i], static_cast<int32_t>(i)};
    n += class_of(row.x[i]) == edge;
  }
  std::sort(row.candidates, row.candidates + n, Before());
  int64_t last = 0;
  for (int64_t i = 0; i < n && (i == 0 || before < top_p * total); ++i) {
    before += row.weights[row.candidates[i].id];
    last = i;
  }
  return {row.candidates[last].logit, row.candidates[last].id};
}

struct Race {
  uint64_t key;
  double temperature;
  double min_p;
  Edge edge;
  double score;  // of the leader, relative to best / T
  int64_t leader;

  void enter(const Row& row, int64_t id) {
    float x = row.x[id];
    if (!edge.keeps(x, id)) return;
    if (min_p > 0 && !(weight(x, row.best, temperature) >= min_p)) return;
    double mine = (static_cast<double>(x) - row.best) / temperature + gumbel(key, id);
    if (mine > score || (mine == score && id < leader)) {
      score = mine;
      leader = id;
    }
  }
};

void race_block(const Row& row, int64_t first, float inverse, Race* race) {
  float bound[kBlock];
  const float* x = row.x + first;
  const uint64_t start = race->key + (static_cast<uint64_t>(first) + 1) * kC1;
  uint32_t high[kBlock];
  for (int j = 0; j < kBlock; ++j) high[j] = static_cast<uint32_t>(mix64(start + static_cast<uint64_t>(j) * kC1) >> 32);
  const float leader = static_cast<float>(race->score) - 1e-3f;
  const float floor = race->edge.logit;
  uint32_t any = 0;
  for (int j = 0; j < kBlock; ++j) {
    float v = static_cast<float>(static_cast<int32_t>(~high[j] >> 1));  // (1 - u) * 2^31, rounded down
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    float log2_v = static_cast<float>(bits) * 0x1p-23f - (127.0f + 31.0f);
    bound[j] = (x[j] - row.best) * inverse - 0.6931470f * log2_v;
    any |= static_cast<uint32_t>((bound[j] > leader) & (x[j] >= floor));
  }
  if (!any) return;
  for (int j = 0; j < kBlock; ++j) {
    if (bound[j] > static_cast<float>(race->score) - 1e-3f) race->enter(row, first + j);
  }
}

int64_t run_race(const Row& row, Race* race) {
  // Rounded so that the bound stays one: distances from the best logit are never overrated.
  const float inverse = static_cast<float>(std::min(1.0 / race->temperature, kBig)) * (1.0f - 1e-6f);
  float floor = race->edge.logit;
  if (race->min_p > 0) {
    double reach = std::log(race->min_p) * race->temperature;
    floor = std::max(floor, static_cast<float>(row.best + reach * (1 + 1e-6)) - 1e-5f * (1 + std::fabs(row.best)));
    race->edge = floor > race->edge.logit ? Edge{floor, row.vocab} : race->edge;
  }
  race->enter(row, first_best(row));
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.block_max[b] < floor) continue;
    int64_t first = b * kBlock;
    if (first + kBlock <= row.vocab) {
      race_block(row, first, inverse, race);
    } else {
      for (int64_t i = first; i < row.vocab; ++i) race->enter(row, i);
    }
  }
  return race->leader;
}

Row make_row(const float* logits, int64_t vocab, Arena* arena) {
  int64_t blocks = (vocab + kBlock - 1) / kBlock;
  size_t floats = (2 * blocks + 15) / 16 * 16 * sizeof(float);
  char* memory = static_cast<char*>(arena->get(floats + vocab * (sizeof(double) + sizeof(Candidate))));
  Row row{};
  row.x = logits;
  row.vocab = vocab;
  row.blocks = blocks;
  row.block_max = reinterpret_cast<float*>(memory);
  row.weights = reinterpret_cast<double*>(memory + floats);
  row.candidates = reinterpret_cast<Candidate*>(memory + floats + vocab * sizeof(double));
  return row;
}

int draw_row(const float* logits, int64_t vocab, const DrawSpec& spec, int64_t* token) {
  *token = -1;
  Row row = make_row(logits, vocab, thread_arena());
  if (!scan(&row)) return kDrawNotANumber;
  if (row.best == -INFINITY) return kDrawEmpty;
  if (spec.temperature == 0) {
    *token = first_best(row);
    return kDrawOk;
  }
  Edge edge{-INFINITY, vocab};
  if (spec.top_k > 0 && spec.top_k < vocab) {
    first_k(row, spec.top_k, row.block_max + row.blocks);
    const Candidate& last = row.candidates[spec.top_k - 1];
    edge = spec.top_p < 1 ? edge_of_sorted(row, spec.top_k, spec.temperature, spec.top_p) : Edge{last.logit, last.id};
  } else if (spec.top_p < 1) {
    edge = edge_of_row(row, spec.temperature, spec.top_p);
  }
  Race race{spec.key, spec.temperature, spec.min_p, edge, -INFINITY, -1};
  *token = run_race(row, &race);
  return kDrawOk;
}

// Log of the sum of exponentials of a row, and its first `top_n` ids with their logits.
void top_row(const float* logits, int64_t vocab, int64_t top_n, double* log_sum, int64_t* ids, float* values) {
  Row row = make_row(logits, vocab, thread_arena());
  bool fine = scan(&row) && row.best != -INFINITY;
  if (!fine) {
    *log_sum = NAN;
    for (int64_t i = 0; i < top_n; ++i) ids[i] = i, values[i] = NAN;
    return;
  }
  weigh(row, 1.0);
  double sums[kBlock] = {};
  int64_t i = 0;
  for (; i + kBlock <= vocab; i += kBlock) {
    for (int j = 0; j < kBlock; ++j) sums[j] += row.weights[i + j];
  }
  for (; i < vocab; ++i) sums[0] += row.weights[i];
  double total = 0;
  for (double sum : sums) total += sum;
  *log_sum = row.best + std::log(total);
  if (top_n > 0) first_k(row, top_n, row.block_max + row.blocks);
  for (int64_t k = 0; k < top_n; ++k) ids[k] = row.candidates[k].id, values[k] = row.candidates[k].logit;
}

}  // namespace
