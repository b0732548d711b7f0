"""Draw one token per row: truncation and the keyed Gumbel race. Native on CPU, Triton on GPUs, torch elsewhere.

The noise is a pure function of integers, so a token's draw knows nothing of the batch, of the order of the
vocabulary, of truncation or of the device. All arithmetic is modulo 2^64, mix64 is splitmix64's finaliser:

    key     = mix64(mix64(mix64(seed + C1) + choice * C2 + 1) + output_index * C3 + 2)
    word(t) = mix64(key + (t + 1) * C1)                 for token id t
    u(t)    = ((word(t) >> 32) + 1/2) / 2^32            in (0, 1), exact in float64
    g(t)    = -ln(-ln(u(t)))                            in float64, between -3.13 and 22.88

and the token is the argmax of logit(t) / temperature + g(t), in float64, over the tokens kept. Tokens are kept
in the order (higher logit, then lower id): the first top_k; of these, renormalised, the shortest prefix that
holds top_p; of these, the ones with at least min_p times the best one's probability. Temperature 0 takes the
first token of that order.

The native version (csrc/cpu/sampling.cpp) does the same with fewer logarithms: a cheap upper bound of g tells
which tokens can still win.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels import cpu, gpu

MASK = (1 << 64) - 1
C1 = 0x9E3779B97F4A7C15
C2 = 0xC2B2AE3D27D4EB4F
C3 = 0x165667B19E3779F9
M1 = 0xBF58476D1CE4E5B9
M2 = 0x94D049BB133111EB

_ROWS_AT_ONCE = 32  # of `top_rows`, which needs 40 bytes for each logit on the way

_SPEC = struct.Struct("@Qdddq")  # nd::DrawSpec


class DrawStatus(enum.IntEnum):
    OK = 0
    EMPTY = 1  # every logit is -inf
    NOT_A_NUMBER = 2  # a logit is NaN or +inf


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn; `key` is `noise_key(...)`, `top_k` 0 keeps all."""

    key: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def mix64(z: int) -> int:
    """splitmix64's finaliser."""
    z &= MASK
    z = ((z ^ (z >> 30)) * M1) & MASK
    z = ((z ^ (z >> 27)) * M2) & MASK
    return z ^ (z >> 31)


def noise_key(seed: int, choice: int, output_index: int) -> int:
    """The key of all noise at one output position; a negative seed stands for its two's complement."""
    key = mix64(seed + C1)
    key = mix64(key + choice * C2 + 1)
    return mix64(key + output_index * C3 + 2)


def draw_rows(logits_RV: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Token ids (int64, -1 where there is none) and `DrawStatus` (int8) of each row, on the logits' device.

    `logits_RV`: float32, rows contiguous.
    """
    if logits_RV.device.type == "cpu" and cpu.library() is not None:
        return draw_rows_native(logits_RV, draws)
    if gpu.enabled(logits_RV):
        drawn: tuple[Tensor, Tensor] = gpu.sampling.draw_rows(logits_RV, draws)
        return drawn
    return draw_rows_torch(logits_RV, draws)


def draw_rows_native(logits_RV: Tensor, draws: Sequence[Draw], isa: cpu.Isa = cpu.Isa.BEST) -> tuple[Tensor, Tensor]:
    """`draw_rows` by the CPU kernel."""
    lib = cpu.library()
    assert lib is not None
    assert logits_RV.dtype == torch.float32
    assert logits_RV.stride(1) == 1
    specs = b"".join(_SPEC.pack(d.key, d.temperature, d.top_p, d.min_p, d.top_k) for d in draws)
    rows, vocab_size = logits_RV.shape
    token_ids_R = torch.empty(rows, dtype=torch.int64)
    status_R = torch.empty(rows, dtype=torch.int8)
    lib.nd_draw_rows(
        isa,
        torch.get_num_threads(),
        logits_RV.data_ptr(),
        logits_RV.stride(0),
        rows,
        vocab_size,
        specs,
        token_ids_R.data_ptr(),
        status_R.data_ptr(),
    )
    return token_ids_R, status_R


def draw_rows_torch(logits_RV: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """`draw_rows` in plain torch, on any device."""
    best_R, greedy_R = logits_RV.max(dim=-1)
    status_R = torch.zeros(len(draws), dtype=torch.int8, device=logits_RV.device)
    status_R.masked_fill_(torch.isneginf(best_R), DrawStatus.EMPTY)
    status_R.masked_fill_(torch.isnan(best_R) | torch.isposinf(best_R), DrawStatus.NOT_A_NUMBER)
    token_ids_R = greedy_R.clone()
    whole: list[int] = []
    for r, draw in enumerate(draws):
        if draw.temperature == 0:
            continue
        if draw.top_k <= 0 and draw.top_p >= 1 and draw.min_p <= 0:
            whole.append(r)
            continue
        ids_K = _kept(logits_RV[r], draw)
        z_K = (logits_RV[r, ids_K].double() - best_R[r].double()) / draw.temperature  # no temperature makes it infinite
        token_ids_R[r] = ids_K[(z_K + gumbel_torch([draw.key], ids_K)[0]).argmax()]
    if whole:
        index_G = torch.tensor(whole, device=logits_RV.device)
        temperature_G1 = torch.tensor(
            [[draws[r].temperature] for r in whole], dtype=torch.float64, device=index_G.device
        )
        z_GV = (logits_RV[index_G].double() - best_R[index_G].double().unsqueeze(1)) / temperature_G1
        ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
        token_ids_R[index_G] = (z_GV + gumbel_torch([draws[r].key for r in whole], ids_V)).argmax(dim=-1)
    return token_ids_R.masked_fill(status_R != DrawStatus.OK, -1), status_R


def gumbel_torch(keys: Sequence[int], ids_K: Tensor) -> Tensor:
    """Noise g of every key and token id: float64 [keys, K]."""
    key_G1 = torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=ids_K.device).unsqueeze(1)
    z = key_G1 + (ids_K.to(torch.int64) + 1) * _signed(C1)
    z = (z ^ _shift(z, 30)) * _signed(M1)
    z = (z ^ _shift(z, 27)) * _signed(M2)
    z = z ^ _shift(z, 31)
    u = (_shift(z, 32).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(u))


def _kept(logits_V: Tensor, draw: Draw) -> Tensor:
    """Token ids that truncation leaves, best first."""
    vocab_size = logits_V.shape[0]
    limit = min(draw.top_k, vocab_size) if draw.top_k > 0 else vocab_size
    total = None
    if draw.top_p < 1 and limit == vocab_size:
        total = _weights(logits_V, logits_V.max(), draw.temperature).sum()
    width = limit if draw.top_k > 0 else min(256, vocab_size)
    while True:
        ids_K = first_ids(logits_V, width)
        weight_K = _weights(logits_V[ids_K], logits_V[ids_K[0]], draw.temperature)
        keep = torch.ones_like(weight_K, dtype=torch.bool)
        if draw.top_p < 1:
            before_K = weight_K.cumsum(0) - weight_K
            keep &= before_K < draw.top_p * (weight_K.sum() if total is None else total)
        if draw.min_p > 0:
            keep &= weight_K >= draw.min_p
        keep[0] = True
        if width == limit or not bool(keep[-1]):
            return ids_K[keep]
        width = min(width * 8, limit)


def first_ids(logits: Tensor, count: int) -> Tensor:
    """The first `count` ids of the last dimension in the order (higher logit, lower id)."""
    bits = (logits + 0.0).view(torch.int32).long()  # adding zero makes -0 equal to 0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ids_V = torch.arange(logits.shape[-1], device=logits.device)
    ids: Tensor = ((ordered << 32) - ids_V).topk(count).indices
    return ids


def _weights(logits: Tensor, best: Tensor, temperature: float) -> Tensor:
    return ((logits.double() - best.double()) / temperature).exp()


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def top_rows(logits_RV: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the sum of exponentials [R], best ids [R, top_n], their logits [R, top_n]) of float32 rows.

    float64, int64 and float32; ids in the order (higher logit, lower id). Rows that hold NaN or +inf, or nothing
    but -inf, give the first ids and NaN.
    """
    if logits_RV.device.type == "cpu" and cpu.library() is not None:
        return top_rows_native(logits_RV, top_n)
    parts = [top_rows_torch(part_RV, top_n) for part_RV in torch.split(logits_RV, _ROWS_AT_ONCE)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def top_rows_torch(logits_RV: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    log_sum_R = logits_RV.double().logsumexp(dim=-1)
    log_sum_R = log_sum_R.masked_fill(log_sum_R.isinf(), torch.nan)
    is_bad_R1 = log_sum_R.isnan().unsqueeze(1)
    ids_RN = torch.where(is_bad_R1, torch.arange(top_n, device=logits_RV.device), first_ids(logits_RV, top_n))
    values_RN = logits_RV.gather(1, ids_RN).masked_fill(is_bad_R1, torch.nan)
    return log_sum_R, ids_RN, values_RN


def top_rows_native(logits_RV: Tensor, top_n: int, isa: cpu.Isa = cpu.Isa.BEST) -> tuple[Tensor, Tensor, Tensor]:
    lib = cpu.library()
    assert lib is not None
    assert logits_RV.dtype == torch.float32
    assert logits_RV.stride(1) == 1
    rows, vocab_size = logits_RV.shape
    assert 0 <= top_n <= vocab_size
    log_sum_R = torch.empty(rows, dtype=torch.float64)
    ids_RN = torch.empty(rows, top_n, dtype=torch.int64)
    values_RN = torch.empty(rows, top_n, dtype=torch.float32)
    lib.nd_top_rows(
        isa,
        torch.get_num_threads(),
        logits_RV.data_ptr(),
        logits_RV.stride(0),
        rows,
        vocab_size,
        top_n,
        log_sum_R.data_ptr(),
        ids_RN.data_ptr(),
        values_RN.data_ptr(),
    )
    return log_sum_R, ids_RN, values_RN


def gumbel_reference(key: int, token_id: int) -> float:
    """Noise g of one token in plain Python: the definition."""
    word = mix64(key + (token_id + 1) * C1)
    u = ((word >> 32) + 0.5) / 2.0**32
    return -math.log(-math.log(u))
