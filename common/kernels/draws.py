"""Draws as one array of numbers, so that a device draws many rows without the host: see `common.kernels.sampling`.

A row of `draws_R6`, int64, is

    column      0    1            2      3      4      5
    holds       key  temperature  top_p  min_p  top_k  kind
    as          u64  f64          f64    f64    i64    `DrawKind`

with the bits of an unsigned or a floating point number in the place of a whole one. A row of zeros is greedy, which is
what padding wants.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kernels import gpu
from common.kernels.sampling import C1, C2, C3, M1, M2, Draw, draw_rows

COLUMNS = 6

_C1, _C2, _C3, _M1, _M2, _ONE, _TWO, _27, _30, _31 = (np.uint64(n) for n in (C1, C2, C3, M1, M2, 1, 2, 27, 30, 31))


class DrawKind(enum.IntEnum):
    GREEDY = 0
    PLAIN = 1  # of all tokens
    TRUNCATED = 2  # of what top_k, top_p or min_p leave


def pack_draws(draws: Sequence[Draw]) -> NDArray[np.int64]:
    """`draws_R6` of these draws."""
    return pack_columns(
        np.array([d.key for d in draws], np.uint64),
        np.array([d.temperature for d in draws], np.float64),
        np.array([d.top_k for d in draws], np.int64),
        np.array([d.top_p for d in draws], np.float64),
        np.array([d.min_p for d in draws], np.float64),
    )


def pack_columns(
    keys_R: NDArray[np.uint64],
    temperatures_R: NDArray[np.float64],
    top_k_R: NDArray[np.int64],
    top_p_R: NDArray[np.float64],
    min_p_R: NDArray[np.float64],
) -> NDArray[np.int64]:
    """`draws_R6` of what is already in arrays."""
    out_R6 = np.empty((len(keys_R), COLUMNS), np.int64)
    out_R6[:, 0] = keys_R.view(np.int64)
    floats_R6 = out_R6.view(np.float64)
    for column, values_R in ((1, temperatures_R), (2, top_p_R), (3, min_p_R)):
        floats_R6[:, column] = values_R
    out_R6[:, 4] = top_k_R
    limits_R = (top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)
    out_R6[:, 5] = (temperatures_R != 0) * (limits_R + np.int64(1))  # of `DrawKind`
    return out_R6


def any_truncated(draws_R6: NDArray[np.int64]) -> bool:
    """What `draw_packed` is to be told."""
    return bool((draws_R6[:, 5] == DrawKind.TRUNCATED).any())


def unpack_draws(draws_R6: NDArray[np.int64]) -> list[Draw]:
    keys, floats = draws_R6[:, 0].view(np.uint64).tolist(), draws_R6.view(np.float64)
    temperatures, top_p, min_p = (floats[:, column].tolist() for column in (1, 2, 3))
    return [Draw(*row) for row in zip(keys, temperatures, draws_R6[:, 4].tolist(), top_p, min_p, strict=True)]


def noise_keys(
    seeds_R: NDArray[np.uint64], choices_R: NDArray[np.uint64], indices_R: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """`common.kernels.sampling.noise_key` of many places."""
    key_R = _mix64(seeds_R + _C1)
    key_R = _mix64(key_R + choices_R * _C2 + _ONE)
    return _mix64(key_R + indices_R * _C3 + _TWO)


def _mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> _30)) * _M1
    z = (z ^ (z >> _27)) * _M2
    return z ^ (z >> _31)


def draw_packed(logits_RV: Tensor, draws_R6: Tensor, *, truncated: bool = True) -> tuple[Tensor, Tensor]:
    """One token per row: ids (int64 [R], -1 where there is none) and `DrawStatus` (int8 [R]).

    `logits_RV`: float32, rows contiguous; it may be of any stride, and is left as it is. `draws_R6`: int64 on the same
    device. On a GPU with Triton nothing waits for the host and shapes follow from those of the arguments alone, so a
    graph can hold the draw: what is in `draws_R6` may change between replays. `truncated=False` promises that no row
    is of kind TRUNCATED, and saves the kernels of these.
    """
    if gpu.enabled(logits_RV):
        ids_status: tuple[Tensor, Tensor] = gpu.sampling.draw_packed(logits_RV, draws_R6, truncated=truncated)
        return ids_status
    return draw_rows(logits_RV, unpack_draws(draws_R6.cpu().numpy()))


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for; `array` may change as soon as this returns."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.clone() if device.type != "cuda" else sent(tensor, device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, by a copy that the host does not wait for; on the CPU it is there."""
    return tensor if device.type != "cuda" else tensor.pin_memory().to(device, non_blocking=True)
