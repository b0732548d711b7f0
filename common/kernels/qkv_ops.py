"""From projected queries, keys and values to attention in one pass: norm, rotation, and the write to the cache.

Only on a GPU, where each operation of its own costs a launch and a pass; elsewhere a layer composes them.
"""

from __future__ import annotations

from torch import Tensor

from common.kernels import gpu


def can_norm_turn_store(q_THD: Tensor, k_TUD: Tensor, v_TUD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> bool:
    """Is there a kernel for these?"""
    return (
        gpu.enabled(q_THD)
        and q_THD.stride(2) == k_TUD.stride(2) == v_TUD.stride(2) == cos_T1R.stride(2) == 1
        and cos_T1R.stride() == sin_T1R.stride()
    )


def norm_turn_store(
    q_THD: Tensor,
    k_TUD: Tensor,
    v_TUD: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    cache: Tensor,
    slots_T: Tensor,
    scales: tuple[float, float] | None,
    behind: Tensor | None = None,
) -> Tensor:
    """Queries normed and turned, a new [T, H, D]; keys, which are so too, and values lie in the cache.

    `weights`, [D] each: of the norms of queries and of keys, None without norms. Heads turn as far as the rotation is
    wide. `cache`: [num_blocks, 2, U, block_size, D], one layer's view; token t's place in it is `slots_T` (int64).
    `scales`: of keys and of values, where the cache is float8_e4m3fn. `behind`: what is read behind attention, a
    constant, is brought nearer meanwhile.
    """
    return gpu.qkv.norm_turn_store(q_THD, k_TUD, v_TUD, weights, eps, cos_T1R, sin_T1R, cache, slots_T, scales, behind)
