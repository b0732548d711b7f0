"""The way from projected queries, keys and values to attention, in one kernel where there is one."""

from __future__ import annotations

from torch import Tensor

from common.kernels.qkv_ops import can_norm_turn_store, norm_turn_store
from common.kvcache.layout import KVPlace
from common.layers.step import MAIN_ROPE, Step


def store_in_one(
    q_THD: Tensor,
    k_TUD: Tensor,
    v_TUD: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    step: Step,
    place: KVPlace,
    behind: Tensor,
) -> Tensor | None:
    """Norm and turn queries and keys, put keys and values in the cache: the queries, a new [T, H, D].

    None, with nothing done, where that takes several operations. `weights`: of the norms of queries and of keys;
    `behind`: of the projection behind attention.
    """
    cos_T1R, sin_T1R = step.rope[MAIN_ROPE]
    if not step.ctx.backend.plain_writes or not can_norm_turn_store(q_THD, k_TUD, v_TUD, cos_T1R, sin_T1R):
        return None
    cache, slots_T, scales = step.cache(place), step.tables(place).slots_T, step.scales(place)
    numbers = None if scales is None else (scales.k, scales.v)
    return norm_turn_store(q_THD, k_TUD, v_TUD, weights, eps, cos_T1R, sin_T1R, cache, slots_T, numbers, behind)
