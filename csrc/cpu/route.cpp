// Which experts a token goes to. A row's result depends on that row alone; equal scores go to the lower id.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace nd {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

void score(const float* logits, int64_t n, Scoring scoring, float* out) {
  if (scoring == kSoftmax) {
    float largest = kLowest;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, logits[i]);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(out[i] / sum);
  } else if (scoring == kSigmoid) {
    for (int64_t i = 0; i < n; ++i) out[i] = 1.0f / (1.0f + std::exp(-logits[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(logits[i] > 20 ? logits[i] : std::log1p(std::exp(logits[i])));
  }
}

// The `count` largest of n values, larger first. Values that are NaN or -inf come last, in the order of their ids.
void largest_of(const float* values, int64_t n, int64_t count, int64_t* ids) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(values[i] > (found < count ? kLowest : values[ids[count - 1]]))) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && values[i] > values[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = i;
  }
  for (int64_t i = 0; found < count; ++i) {
    if (std::find(ids, ids + found, i) == ids + found) ids[found++] = i;
  }
}

// Sets all values to -inf but those of the `keep` groups whose two best have the largest sum.
void keep_best_groups(float* values, int64_t n, int64_t groups, int64_t keep, float* sums, int64_t* ids) {
  const int64_t size = n / groups;
  for (int64_t g = 0; g < groups; ++g) {
    float best = kLowest, second = kLowest;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      second = std::max(second, std::min(best, values[i]));
      best = std::max(best, values[i]);
    }
    sums[g] = best + second;
  }
  largest_of(sums, groups, keep, ids);
  for (int64_t g = 0; g < groups; ++g) {
    if (std::find(ids, ids + keep, g) == ids + keep) std::fill(values + g * size, values + (g + 1) * size, kLowest);
  }
}

}  // namespace

void route(const RouteCall& call, int threads) {
  constexpr int64_t kRun = 16;
  const auto work = [&](int64_t task) {
    std::vector<float> scores(call.experts), choice(call.experts), sums(call.groups);
    std::vector<int64_t> best(call.groups);
    for (int64_t t = task * kRun; t < std::min(call.tokens, (task + 1) * kRun); ++t) {
      int64_t* ids = call.ids + t * call.top_k;
      float* weights = call.weights + t * call.top_k;
      score(call.logits + t * call.stride, call.experts, call.scoring, scores.data());
      if (!call.given) {
        for (int64_t i = 0; i < call.experts; ++i) choice[i] = scores[i] + (call.bias != nullptr ? call.bias[i] : 0.0f);
        if (call.topk_groups < call.groups) {
          keep_best_groups(choice.data(), call.experts, call.groups, call.topk_groups, sums.data(), best.data());
        }
        largest_of(choice.data(), call.experts, call.top_k, ids);
      }
      float sum = 0;
      for (int64_t j = 0; j < call.top_k; ++j) sum += weights[j] = scores[ids[j]];
      const float divisor = call.normalized ? sum + 1e-20f : 1.0f;
      for (int64_t j = 0; j < call.top_k; ++j) weights[j] = weights[j] / divisor * call.scale;
    }
  };
  parallel(call.tokens * call.experts > 16384 ? threads : 1, (call.tokens + kRun - 1) / kRun, work);
}

void sort_by_expert(const int64_t* ids, int64_t pairs, int64_t experts, int64_t* starts, int64_t* order,
                    int64_t* places) {
  std::fill(starts, starts + experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++starts[ids[i] + 1];
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts, starts + experts);
  for (int64_t i = 0; i < pairs; ++i) {
    places[i] = next[ids[i]]++;
    order[places[i]] = i;
  }
}

}  // namespace nd
