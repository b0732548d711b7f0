// Elements of tensors as floats: conversions, and rows in the order in which pairs of vectors are made.
#pragma once

namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, NaN is all ones
  uint8_t bits;
};

// How elements of a tensor become floats. A *pair* is 2 * W neighbours as two vectors: the first and the second
// half of them, or, for bfloat16 and float8, the even and the odd ones, which cost fewer instructions. `kSplit`
// says which; what is multiplied with a pair, or made from products with it, lies in the same order (`arrange`).
// A pair of float8 is `gain_of` times too small: whoever reads pairs has a factor of his own to put it into.
template <typename T>
struct Element;

template <>
struct Element<float> {
  static constexpr bool kSplit = false;
  static V load(const float* p) { return F::load(p); }
  static void store(float* p, V x) { F::store(p, x); }
  static float get(float x) { return x; }
  static float put(float x) { return x; }
  static V pair0(const float* p) { return F::load(p); }
  static V pair1(const float* p) { return F::load(p + F::W); }
};

template <>
struct Element<Bfloat> {
  static constexpr bool kSplit = true;
  static const uint16_t* raw(const Bfloat* p) { return reinterpret_cast<const uint16_t*>(p); }
  static V load(const Bfloat* p) { return F::load_bf16(raw(p)); }
  static void store(Bfloat* p, V x) { F::store_bf16(reinterpret_cast<uint16_t*>(p), x); }
  static float get(Bfloat x) { return bf16_to_float(x.bits); }
  static Bfloat put(float x) { return {float_to_bf16(x)}; }
  static V pair0(const Bfloat* p) { return F::even_bf16(raw(p)); }
  static V pair1(const Bfloat* p) { return F::odd_bf16(raw(p)); }
};

template <>
struct Element<Half> {
  static constexpr bool kSplit = false;
  static const uint16_t* raw(const Half* p) { return reinterpret_cast<const uint16_t*>(p); }
  static V load(const Half* p) { return F::load_f16(raw(p)); }
  static void store(Half* p, V x) { F::store_f16(reinterpret_cast<uint16_t*>(p), x); }
  static float get(Half x) { return f16_to_float(x.bits); }
  static Half put(float x) { return {float_to_f16(x)}; }
  static V pair0(const Half* p) { return F::load_f16(raw(p)); }
  static V pair1(const Half* p) { return F::load_f16(raw(p) + F::W); }
};

template <>
struct Element<Float8> {
  static constexpr bool kSplit = true;
  static const uint8_t* raw(const Float8* p) { return reinterpret_cast<const uint8_t*>(p); }
  static float get(Float8 x) { return e4m3_to_float(x.bits) * 256.0f; }
  static Float8 put(float x) { return {float_to_e4m3(x)}; }
  static V pair0(const Float8* p) { return F::even_e4m3(raw(p)); }
  static V pair1(const Float8* p) { return F::odd_e4m3(raw(p)); }
};

// Are rows of a cache of this type read in split pairs? Packed rows become bfloat16 first.
inline bool is_split(Dtype dtype) { return dtype == kBfloat16 || dtype == kFloat8 || dtype == kPacked; }
inline float gain_of(Dtype dtype) { return dtype == kFloat8 ? 256.0f : 1.0f; }

constexpr int kPair = 2 * F::W;

inline int64_t whole_pairs(int64_t n) { return (n + kPair - 1) / kPair * kPair; }

template <typename T>
void to_floats(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) F::store(out + i, Element<T>::load(in + i));
  for (; i < n; ++i) out[i] = Element<T>::get(in[i]);
}

template <typename T>
void from_floats(const float* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) Element<T>::store(out + i, F::load(in + i));
  for (; i < n; ++i) out[i] = Element<T>::put(in[i]);
}

// Conversions by a type known at run time. Offsets are in elements.
inline void load_row(const void* base, int64_t offset, Dtype dtype, int64_t n, float* out) {
  if (dtype == kFloat32) return to_floats(static_cast<const float*>(base) + offset, n, out);
  if (dtype == kBfloat16) return to_floats(static_cast<const Bfloat*>(base) + offset, n, out);
  if (dtype == kFloat8) {
    const Float8* in = static_cast<const Float8*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = Element<Float8>::get(in[i]);
    return;
  }
  to_floats(static_cast<const Half*>(base) + offset, n, out);
}

inline void store_row(void* base, int64_t offset, Dtype dtype, int64_t n, const float* in) {
  if (dtype == kFloat32) return from_floats(in, n, static_cast<float*>(base) + offset);
  if (dtype == kBfloat16) return from_floats(in, n, static_cast<Bfloat*>(base) + offset);
  if (dtype == kFloat8) {
    Float8* out = static_cast<Float8*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = Element<Float8>::put(in[i]);
    return;
  }
  from_floats(in, n, static_cast<Half*>(base) + offset);
}

// A row of n floats, filled up with zeros to whole pairs, in the order of pairs. `row` may be `out`.
inline void arrange(const float* row, int64_t n, bool split, float* out) {
  const int64_t padded = whole_pairs(n);
  if (row != out) std::memcpy(out, row, n * sizeof(float));
  for (int64_t i = n; i < padded; ++i) out[i] = 0.0f;
  if (!split) return;
  for (int64_t i = 0; i < padded; i += kPair) {
    float even[F::W], odd[F::W];
    for (int j = 0; j < F::W; ++j) even[j] = out[i + 2 * j], odd[j] = out[i + 2 * j + 1];
    std::memcpy(out + i, even, sizeof(even));
    std::memcpy(out + i + F::W, odd, sizeof(odd));
  }
}

// `arrange` of a row of any type; bfloat16 is split as it is loaded.
inline void load_arranged(const void* base, int64_t offset, Dtype dtype, int64_t n, bool split, float* out) {
  if (dtype != kBfloat16 || !split) {
    load_row(base, offset, dtype, n, out);
    return arrange(out, n, split, out);
  }
  const Bfloat* in = static_cast<const Bfloat*>(base) + offset;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    F::store(out + i, Element<Bfloat>::pair0(in + i));
    F::store(out + i + F::W, Element<Bfloat>::pair1(in + i));
  }
  if (i < n) {
    to_floats(in + i, n - i, out + i);
    arrange(out + i, n - i, true, out + i);
  }
}

// The reverse, in place.
inline void unarrange(float* row, int64_t n, bool split) {
  if (!split) return;
  for (int64_t i = 0; i < n; i += kPair) {
    float both[kPair];
    for (int j = 0; j < F::W; ++j) both[2 * j] = row[i + j], both[2 * j + 1] = row[i + F::W + j];
    std::memcpy(row + i, both, sizeof(both));
  }
}

}  // namespace
