// Rows in 8 bits with scales of their own, see common/kvcache/packing.py: float8 numbers, a float32 scale (a power of
// two) per kScaled of them, bfloat16 numbers. A number is exactly a bfloat16, so rows are unpacked to those, a tile at
// a time, and computed with as a cache of bfloat16 is: to the same bits.

namespace {

constexpr int64_t kScaled = 128;

struct Packed {  // a byte of such a row
  uint8_t bits;
};

struct Packing {
  int64_t latent, rope;

  int64_t scales() const { return (latent + kScaled - 1) / kScaled; }
  int64_t scales_at() const { return (latent + 3) / 4 * 4; }
  int64_t rope_at() const { return scales_at() + 4 * scales(); }
  int64_t nbytes() const { return (rope_at() + 2 * rope + 7) / 8 * 8; }
};

// What rows of a cache are computed with.
template <typename T>
struct Unpacked {
  using type = T;
};
template <>
struct Unpacked<Packed> {
  using type = Bfloat;
};

// The least power of two that is at least max(largest / 448, 1e-4); NaN for what is not finite.
inline float packing_scale(float largest) {
  const float ratio = std::max(largest / 448.0f, 1e-4f);
  uint32_t bits;
  std::memcpy(&bits, &ratio, 4);
  bits = (bits + 0x7fffff) & 0xff800000;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// `row` is fp32 [latent + rope].
inline void pack_row(const float* row, const Packing& packing, uint8_t* out) {
  std::memset(out, 0, packing.nbytes());
  for (int64_t first = 0; first < packing.latent; first += kScaled) {
    const int64_t last = std::min(first + kScaled, packing.latent);
    float largest = 0.0f, scale = NAN;
    bool finite = true;
    for (int64_t d = first; d < last; ++d) {
      finite &= std::isfinite(row[d]);
      largest = std::max(largest, std::fabs(row[d]));
    }
    if (finite) {
      scale = packing_scale(largest);
      const float inverse = 1.0f / scale;  // exact
      for (int64_t d = first; d < last; ++d) out[d] = float_to_e4m3(row[d] * inverse);
    }
    std::memcpy(out + packing.scales_at() + first / kScaled * 4, &scale, 4);
  }
  for (int64_t d = 0; d < packing.rope; ++d) {
    const uint16_t bits = float_to_bf16(row[packing.latent + d]);
    std::memcpy(out + packing.rope_at() + 2 * d, &bits, 2);
  }
}

// `out` is [latent + rope].
inline void unpack_row(const Packed* row, const Packing& packing, Bfloat* out) {
  const uint8_t* in = reinterpret_cast<const uint8_t*>(row);
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  for (int64_t first = 0; first < packing.latent; first += kScaled) {
    const int64_t last = std::min(first + kScaled, packing.latent);
    float gain;
    std::memcpy(&gain, in + packing.scales_at() + first / kScaled * 4, 4);
    const V factor = F::set1(gain * 256.0f);  // pairs of float8 are 2^-8 times the number
    int64_t d = first;
    for (; d + kPair <= last; d += kPair) {
      F::store_bf16_pair(to + d, F::mul(F::even_e4m3(in + d), factor), F::mul(F::odd_e4m3(in + d), factor));
    }
    if (d < last) {
      uint8_t rest[kPair] = {};
      uint16_t numbers[kPair];
      std::memcpy(rest, in + d, last - d);
      F::store_bf16_pair(numbers, F::mul(F::even_e4m3(rest), factor), F::mul(F::odd_e4m3(rest), factor));
      std::memcpy(to + d, numbers, (last - d) * 2);
    }
  }
  std::memcpy(to + packing.latent, in + packing.rope_at(), packing.rope * 2);
}

void pack_rows(const PackCall& call, int threads) {
  const Packing packing{call.latent, call.rope};
  const int64_t width = call.latent + call.rope;
  const auto row = [&](int64_t t) {
    float* floats = static_cast<float*>(thread_arena()->get(width * sizeof(float)));
    load_row(call.rows, t * call.row_stride, call.dtype, width, floats);
    const int64_t block = call.slots[t] / call.block_size, offset = call.slots[t] % call.block_size;
    pack_row(floats, packing,
             static_cast<uint8_t*>(call.cache) + block * call.block_stride + offset * call.token_stride);
  };
  parallel(call.num_tokens * width > 16384 ? threads : 1, call.num_tokens, row);
}

void unpack_rows(const UnpackCall& call, int threads) {
  const Packing packing{call.latent, call.rope};
  const int64_t width = call.latent + call.rope;
  const auto block = [&](int64_t i) {
    const Packed* from = static_cast<const Packed*>(call.cache) + call.block_ids[i] * call.block_stride;
    Bfloat* row = static_cast<Bfloat*>(thread_arena()->get((width * 4 + 64) * 2));
    float* floats = reinterpret_cast<float*>(row + (width + 31) / 32 * 32);
    for (int64_t j = 0; j < call.block_size; ++j, from += call.token_stride) {
      const int64_t at = (i * call.block_size + j) * width;
      if (call.dtype == kBfloat16) {
        unpack_row(from, packing, static_cast<Bfloat*>(call.out) + at);
      } else {
        unpack_row(from, packing, row);
        to_floats(row, width, floats);
        store_row(call.out, at, call.dtype, width, floats);
      }
    }
  };
  parallel(call.num_blocks * call.block_size * width > 65536 ? threads : 1, call.num_blocks, block);
}

}  // namespace
