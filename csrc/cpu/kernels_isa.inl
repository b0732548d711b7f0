// The body of every kernels*.cpp: see simd.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace nd {

#include "cpu/sampling.inl"
#include "cpu/simd.h"

extern const Kernels ND_TABLE = {draw_row, top_row};

}  // namespace nd
