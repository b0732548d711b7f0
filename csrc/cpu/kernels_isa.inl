// The body of every kernels*.cpp: see simd.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace nd {

#include "cpu/simd.h"

#include "cpu/elements.h"
#include "cpu/packed.inl"

#if defined(ND_AMX)
#include "cpu/linear_amx.inl"
#endif

#include "cpu/linear.inl"

#include "cpu/attention_tiles.inl"

#include "cpu/attention.inl"
#include "cpu/indexer.inl"
#include "cpu/pointwise.inl"

#include "cpu/compress.inl"
#include "cpu/delta.inl"
#include "cpu/sampling.inl"

extern const Kernels ND_TABLE = {rms_norm,   rope,      silu_mul,     sigmoid_mul,    combine,          attend,
                                 write_rows, linear,    linear_batch, linear_experts, select_positions, delta_net,
                                 draw_row,   top_row,   pool_entries, stream_weights, collapse_streams, mix_streams,
                                 join_parts, pack_rows, unpack_rows};

}  // namespace nd
