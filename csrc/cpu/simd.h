// One vector of floats per instruction set, under one name, so that each kernel is written once.
//
// A file kernels_<isa>.cpp defines ND_ISA_<ISA> and includes this header and the kernels (*.inl). All of it is
// in an anonymous namespace: an inline function with a name of its own, compiled for AVX-512, could be the copy
// that the linker keeps for everybody.
//
//     F::W         floats in a vector
//     load, store  unaligned; those of bf16 and f16 convert (round to nearest even)
//     sum, sum4    of the W floats of one vector, or of each of four: the same order of additions
#pragma once

namespace {

inline float bf16_to_float(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x & 0x7fff) << 13;
  float out;
  if (bits >= 0x0f800000) {  // infinity, NaN
    bits += 0x70000000;
    std::memcpy(&out, &bits, 4);
  } else {  // the exponent is rebiased by a product, which also scales subnormal numbers
    std::memcpy(&out, &bits, 4);
    out *= 0x1p112f;
  }
  std::memcpy(&bits, &out, 4);
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00 | static_cast<uint16_t>(bits >> 13 & 0x3ff);
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: the addition rounds at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}

// 2^-8 times the number: the bits of a float16 whose exponent is biased by 8 less.
inline float e4m3_to_float(uint8_t x) {
  const uint16_t half = static_cast<uint16_t>((x & 0x80) << 8 | (x & 0x7f) << 7);
  return f16_to_float((x & 0x7f) == 0x7f ? static_cast<uint16_t>(half | 0x7e00) : half);
}

// Round to nearest even; what is larger than 448, the largest number, becomes that. NaN stays NaN.
inline uint8_t float_to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  bits = bits < 0x43e00000 ? bits : 0x43e00000;  // 448
  if (bits < 0x3c800000) {                       // below 2^-6 it is subnormal: the addition rounds at 2^-9
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 16384.0f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint8_t>(sign | (bits - 0x46800000));
  }
  bits += 0x7ffff + (bits >> 20 & 1);
  return static_cast<uint8_t>(sign | (bits - 0x3c000000) >> 20);
}

#if defined(ND_ISA_AVX512)

struct F {
  static constexpr int W = 16;
  using V = __m512;
  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static bool any_nan(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static float sum(V a) {
    float out[4];
    sum4(a, a, a, a, out);
    return out[0];
  }
  static float largest(V a) { return _mm512_reduce_max_ps(a); }
  static V from_bits(__m512i x) { return _mm512_castsi512_ps(x); }
  static V load_bf16(const uint16_t* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store_bf16(uint16_t* p, V x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    __m256i out = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(near, nan, quiet));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
  }
  static V even_bf16(const uint16_t* p) { return from_bits(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static V odd_bf16(const uint16_t* p) {
    return from_bits(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  // Neighbours from two vectors of numbers that bfloat16 holds.
  static void store_bf16_pair(uint16_t* p, V even, V odd) {
    const __m512i high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    _mm512_storeu_si512(p, _mm512_or_si512(high, _mm512_srli_epi32(_mm512_castps_si512(even), 16)));
  }
  static __m256i words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  // `x`: e4m3 in the high bytes of words. Shifted, it is a float16 of 2^-8 times the number; all ones stay NaN.
  static V from_e4m3(__m256i x) {
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(x, 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const __mmask16 nan =
        _mm256_cmpeq_epi16_mask(_mm256_slli_epi16(half, 2), _mm256_set1_epi16(static_cast<short>(0xfe00)));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00)));
  }
  static V even_e4m3(const uint8_t* p) { return from_e4m3(_mm256_slli_epi16(words(p), 8)); }
  static V odd_e4m3(const uint8_t* p) { return from_e4m3(words(p)); }
  static V load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void sum4(V a, V b, V c, V d, float* out) {
    const auto half = [](V x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  static V zero_unless_above(V x, V limit, V value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), value);
  }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V power_of_two(V n) {
    return from_bits(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
};

#elif defined(ND_ISA_AVX2)

struct F {
  static constexpr int W = 8;
  using V = __m256;
  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static bool any_nan(V a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static float sum(V a) {
    float out[4];
    sum4(a, a, a, a, out);
    return out[0];
  }
  static float largest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static V from_bits(__m256i x) { return _mm256_castsi256_ps(x); }
  static V load_bf16(const uint16_t* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store_bf16(uint16_t* p, V x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    __m256i words = _mm256_blendv_epi8(near, quiet, nan);
    __m128i out = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), out);
  }
  static V even_bf16(const uint16_t* p) {
    return from_bits(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static V odd_bf16(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return from_bits(_mm256_blend_epi16(_mm256_setzero_si256(), words, 0xaa));
  }
  static void store_bf16_pair(uint16_t* p, V even, V odd) {  // as for AVX-512
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xaa));
  }
  static __m128i words(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static V from_e4m3(__m128i x) {  // as for AVX-512
    const __m128i half = _mm_and_si128(_mm_srai_epi16(x, 1), _mm_set1_epi16(static_cast<short>(0xbf80)));
    const __m128i nan = _mm_cmpeq_epi16(_mm_slli_epi16(half, 2), _mm_set1_epi16(static_cast<short>(0xfe00)));
    return _mm256_cvtph_ps(_mm_or_si128(half, nan));
  }
  static V even_e4m3(const uint8_t* p) { return from_e4m3(_mm_slli_epi16(words(p), 8)); }
  static V odd_e4m3(const uint8_t* p) { return from_e4m3(words(p)); }
  static V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_f16(uint16_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void sum4(V a, V b, V c, V d, float* out) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  static V zero_unless_above(V x, V limit, V value) {
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ), value);
  }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V power_of_two(V n) {
    return from_bits(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
};

#else

struct F {
  static constexpr int W = 8;
  struct V {
    float x[W];
  };
  template <typename Fn>
  static V make(Fn fn) {
    V out;
    for (int i = 0; i < W; ++i) out.x[i] = fn(i);
    return out;
  }
  static V zero() { return set1(0.0f); }
  static V set1(float v) {
    return make([=](int) { return v; });
  }
  static V load(const float* p) {
    return make([=](int i) { return p[i]; });
  }
  static void store(float* p, const V& a) {
    for (int i = 0; i < W; ++i) p[i] = a.x[i];
  }
  static V add(const V& a, const V& b) {
    return make([&](int i) { return a.x[i] + b.x[i]; });
  }
  static V mul(const V& a, const V& b) {
    return make([&](int i) { return a.x[i] * b.x[i]; });
  }
  static V fma(const V& a, const V& b, const V& c) {
    return make([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static V max(const V& a, const V& b) {
    return make([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static V min(const V& a, const V& b) {
    return make([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
  }
  static V div(const V& a, const V& b) {
    return make([&](int i) { return a.x[i] / b.x[i]; });
  }
  static bool any_nan(const V& a) {
    bool any = false;
    for (int i = 0; i < W; ++i) any |= a.x[i] != a.x[i];
    return any;
  }
  static float sum(const V& a) {
    return ((a.x[0] + a.x[1]) + (a.x[2] + a.x[3])) + ((a.x[4] + a.x[5]) + (a.x[6] + a.x[7]));
  }
  static float largest(const V& a) {
    float best = a.x[0];
    for (int i = 1; i < W; ++i) best = a.x[i] > best ? a.x[i] : best;
    return best;
  }
  static V load_bf16(const uint16_t* p) {
    return make([=](int i) { return bf16_to_float(p[i]); });
  }
  static void store_bf16(uint16_t* p, const V& a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(a.x[i]);
  }
  static V even_bf16(const uint16_t* p) {
    return make([=](int i) { return bf16_to_float(p[2 * i]); });
  }
  static V odd_bf16(const uint16_t* p) {
    return make([=](int i) { return bf16_to_float(p[2 * i + 1]); });
  }
  static void store_bf16_pair(uint16_t* p, const V& even, const V& odd) {
    for (int i = 0; i < W; ++i) p[2 * i] = float_to_bf16(even.x[i]), p[2 * i + 1] = float_to_bf16(odd.x[i]);
  }
  static V even_e4m3(const uint8_t* p) {
    return make([=](int i) { return e4m3_to_float(p[2 * i]); });
  }
  static V odd_e4m3(const uint8_t* p) {
    return make([=](int i) { return e4m3_to_float(p[2 * i + 1]); });
  }
  static V load_f16(const uint16_t* p) {
    return make([=](int i) { return f16_to_float(p[i]); });
  }
  static void store_f16(uint16_t* p, const V& a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_f16(a.x[i]);
  }
  static void sum4(const V& a, const V& b, const V& c, const V& d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
  static V zero_unless_above(const V& x, const V& limit, const V& value) {
    return make([&](int i) { return x.x[i] > limit.x[i] ? value.x[i] : 0.0f; });
  }
  static V round(const V& a) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23
    return make([&](int i) { return (a.x[i] + magic) - magic; });
  }
  static V power_of_two(const V& n) {
    return make([&](int i) {
      uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.x[i]) + 127) << 23;
      float out;
      std::memcpy(&out, &bits, 4);
      return out;
    });
  }
};

#endif

using V = F::V;

// exp of x <= 88, relative error under 2e-7, 1 for 0; below -87 it is exactly 0 (Cody and Waite's reduction,
// Cephes' polynomial).
inline V exp_v(V raw) {
  const V lowest = F::set1(-87.0f);
  const V x = F::max(raw, lowest);
  V n = F::round(F::mul(x, F::set1(1.44269504088896341f)));
  V r = F::fma(n, F::set1(-0.693359375f), x);
  r = F::fma(n, F::set1(2.12194440e-4f), r);
  V p = F::set1(1.9875691500e-4f);
  p = F::fma(p, r, F::set1(1.3981999507e-3f));
  p = F::fma(p, r, F::set1(8.3334519073e-3f));
  p = F::fma(p, r, F::set1(4.1665795894e-2f));
  p = F::fma(p, r, F::set1(1.6666665459e-1f));
  p = F::fma(p, r, F::set1(5.0000001201e-1f));
  p = F::add(F::fma(F::mul(r, r), p, r), F::set1(1.0f));
  return F::zero_unless_above(raw, lowest, F::mul(p, F::power_of_two(n)));
}

}  // namespace
