"""The kernel of `common.parallel.oneshot`, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOOK = tl.constexpr(1024)  # turns of waiting, each of about a microsecond, between looks at the host's memory


@triton.jit
def one_shot(
    x_ptr,
    bases_ptr,  # int64 [size + 1]: where each rank's memory begins, in this process; a word that ends all waiting
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
            behind = epoch - tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")  # which may wrap around
            turns = 0
            while behind > 0:
                behind = epoch - tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
                turns += 1
                if turns % LOOK == 0:
                    stop_ptr = tl.load(bases_ptr + size).to(tl.pointer_type(tl.int32))
                    stop = tl.atomic_add(stop_ptr, 0, sem="acquire", scope="sys")  # one thread looks, for all
                    behind = tl.where(stop == 0, behind, 0)
            theirs = tl.multiple_of((tl.load(bases_ptr + other) + slot).to(x_ptr.dtype), 16)
            total += tl.load(theirs + at, mask=mask, cache_modifier=".cg").to(tl.float32)
    tl.store(x_ptr + at, total.to(x_ptr.dtype.element_ty), mask=mask)
