"""The kernel of `common.parallel.oneshot`, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_shot(
    x_ptr,
    bases_ptr,  # int64 [size]: where each rank's memory begins, in this process
    n,
    slot_nbytes: tl.constexpr,
    flags_at: tl.constexpr,
    slots_at: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """`x` becomes its sum over ranks, added up in their order in fp32. A program does its part of `x` by itself."""
    program = tl.program_id(0)
    own = tl.load(bases_ptr + rank)
    count_ptr = (own + program * 4).to(tl.pointer_type(tl.int32))
    epoch = tl.load(count_ptr) + 1
    slot = slots_at + (epoch & 1).to(tl.int64) * slot_nbytes
    at = program * block + tl.arange(0, block)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask)
    tl.store(tl.multiple_of((own + slot).to(x_ptr.dtype), 16) + at, x, mask=mask)
    tl.debug_barrier()
    tl.store(count_ptr, epoch)
    for other in tl.static_range(size):
        if other != rank:
            flag = tl.load(bases_ptr + other) + flags_at + (program * size + rank) * 4
            tl.atomic_xchg(flag.to(tl.pointer_type(tl.int32)), epoch, sem="release", scope="sys")
    total = tl.zeros([block], tl.float32)
    for other in tl.static_range(size):
        if other == rank:
            total += x.to(tl.float32)
        else:
            flag_ptr = (own + flags_at + (program * size + other) * 4).to(tl.pointer_type(tl.int32))
            while epoch - tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") > 0:  # which may wrap around
                pass
            theirs = tl.multiple_of((tl.load(bases_ptr + other) + slot).to(x_ptr.dtype), 16)
            total += tl.load(theirs + at, mask=mask, cache_modifier=".cg").to(tl.float32)
    tl.store(x_ptr + at, total.to(x_ptr.dtype.element_ty), mask=mask)
