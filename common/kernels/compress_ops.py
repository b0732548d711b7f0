"""Operations of DeepSeek-V4 around products and attention: entries from tokens, joining parts, residual streams.

As in `common.kernels.ops`, the kernels compute every row alone and in one order, and torch is the fallback.

Shape letters: T tokens, S streams, D width, N entries, L tokens of an entry, H heads.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from common.kernels import cpu, gpu
from common.kernels.ops import DTYPES

_POOL = struct.Struct("@13qi4x")  # nd::PoolCall
_WEIGHTS = struct.Struct("@9qf4x")  # nd::StreamWeightsCall
_JOIN = struct.Struct("@9qi4x")  # nd::JoinCall
_STREAMS = struct.Struct("@7qi4x")  # nd::StreamsCall

StreamWeights = tuple[Tensor, Tensor, Tensor]
"""pre [T, S], post [T, S], comb [T, S, S], all fp32."""


def pool_entries(
    cache: Tensor, slots_NL: Tensor, bias_LD: Tensor, gate_column: int, own: int = 0, *, isa: cpu.Isa = cpu.Isa.BEST
) -> Tensor:
    """The mean of tokens' values, weighted in each column by the softmax of gate + bias: fp32 [N, D].

    `cache`: [num_blocks, block_size, columns]; a row holds values from column 0 on and gates from `gate_column` on.
    `slots_NL`: int64, block * block_size + offset of each token, -1 for one that is left out; `bias_LD`: fp32.
    `own` above 0: the first L - own tokens are read as said, the last `own` D columns further to the right.

    Kernels of GPUs take an entry whose last token is left out for none, and give zeros.
    """
    if gpu.enabled(cache) and cache.stride(2) == slots_NL.stride(1) == 1 and bias_LD.is_contiguous():
        pooled_ND: Tensor = gpu.compress.pool_entries(cache, slots_NL, bias_LD, gate_column, own)
        return pooled_ND
    entries, tokens = slots_NL.shape
    size, width = cache.shape[1], bias_LD.shape[1]
    lib = cpu.library()
    if lib is None or cache.device.type != "cpu" or cache.stride(2) != 1:
        place_NL = slots_NL.clamp(min=0)
        rows_NLC = cache[place_NL // size, place_NL % size].float()
        shift = torch.zeros(tokens, 1, dtype=torch.int64, device=cache.device)
        shift[tokens - own :] = width if own else 0
        columns_NLD = (shift + torch.arange(width, device=cache.device)).expand(entries, -1, -1)
        left_out = (slots_NL < 0)[:, :, None]
        gates = rows_NLC.gather(2, columns_NLD + gate_column) + bias_LD
        weights = gates.masked_fill(left_out, float("-inf")).softmax(1)
        return (weights * rows_NLC.gather(2, columns_NLD).masked_fill(left_out, 0.0)).sum(1)
    assert slots_NL.dtype == torch.int64
    assert bias_LD.dtype == torch.float32
    assert slots_NL.is_contiguous()
    assert bias_LD.is_contiguous()
    out = torch.empty(entries, width)
    call = _POOL.pack(
        cache.data_ptr(),
        slots_NL.data_ptr(),
        bias_LD.data_ptr(),
        out.data_ptr(),
        entries,
        tokens,
        own,
        width,
        size,
        gate_column,
        width if own else 0,
        *cache.stride()[:2],
        DTYPES[cache.dtype],
    )
    lib.nd_pool_entries(isa, torch.get_num_threads(), call)
    return out


def stream_weights(
    mix: Tensor, scale: Tensor, base: Tensor, streams: int, steps: int, eps: float, *, isa: cpu.Isa = cpu.Isa.BEST
) -> StreamWeights:
    """Weights of hyper-connections, of fp32 rows [pre S | post S | comb S x S] with a scale for each part.

    pre = sigmoid + eps, post = 2 sigmoid; comb = softmax over the last dimension + eps, then made doubly stochastic by
    `steps` steps of Sinkhorn and Knopp.
    """
    tokens, columns = mix.shape
    assert columns == base.shape[0] == (2 + streams) * streams
    if _on_gpu(mix, scale, base):
        found: StreamWeights = gpu.compress.stream_weights(mix, scale, base, streams, steps, eps)
        return found
    lib = _library(mix, scale, base)
    if lib is None:
        pre = mix[:, :streams] * scale[0] + base[:streams]
        post = mix[:, streams : 2 * streams] * scale[1] + base[streams : 2 * streams]
        comb = mix[:, 2 * streams :] * scale[2] + base[2 * streams :]
        comb = comb.view(tokens, streams, streams).softmax(2) + eps
        for step in range(steps):
            if step:
                comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return pre.sigmoid() + eps, 2 * post.sigmoid(), comb
    pre, post = mix.new_empty(tokens, streams), mix.new_empty(tokens, streams)
    comb = mix.new_empty(tokens, streams, streams)
    out = pre.data_ptr(), post.data_ptr(), comb.data_ptr()
    call = _WEIGHTS.pack(mix.data_ptr(), scale.data_ptr(), base.data_ptr(), *out, tokens, streams, steps, eps)
    lib.nd_stream_weights(isa, torch.get_num_threads(), call)
    return pre, post, comb


def collapse_weights(mix_TS: Tensor, scale: Tensor, base: Tensor, eps: float) -> Tensor:
    """`pre` alone, with one scale: fp32 [T, S]."""
    lib = _library(mix_TS, scale, base)
    if lib is None:
        return (mix_TS * scale + base).sigmoid() + eps
    pre_TS = torch.empty_like(mix_TS)
    at = mix_TS.data_ptr(), scale.data_ptr(), base.data_ptr(), pre_TS.data_ptr()
    lib.nd_stream_weights(cpu.Isa.BEST, torch.get_num_threads(), _WEIGHTS.pack(*at, 0, 0, *mix_TS.shape, 0, eps))
    return pre_TS


def collapse_streams(x_TSD: Tensor, weights_TS: Tensor, *, isa: cpu.Isa = cpu.Isa.BEST) -> Tensor:
    """The sum over streams of weight * stream, in fp32 and rounded once: a new [T, D] of x's type."""
    if _on_gpu(x_TSD, weights_TS):
        collapsed_TD: Tensor = gpu.compress.collapse_streams(x_TSD, weights_TS)
        return collapsed_TD
    lib = _library(x_TSD, weights_TS)
    if lib is None:
        return (weights_TS[:, :, None] * x_TSD).sum(1).to(x_TSD.dtype)
    tokens, streams, width = x_TSD.shape
    out_TD = torch.empty(tokens, width, dtype=x_TSD.dtype)
    at = x_TSD.data_ptr(), out_TD.data_ptr(), weights_TS.data_ptr(), 0
    call = _STREAMS.pack(*at, tokens, streams, width, DTYPES[x_TSD.dtype])
    lib.nd_collapse_streams(isa, torch.get_num_threads(), call)
    return out_TD


def mix_streams(x_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, *, isa: cpu.Isa = cpu.Isa.BEST) -> None:
    """In place: stream k becomes post[k] * y + the sum over j of comb[j, k] * stream j, in fp32 and rounded once."""
    if _on_gpu(x_TSD, y_TD, post_TS, comb_TSS):
        gpu.compress.mix_streams(x_TSD, y_TD, post_TS, comb_TSS)
        return
    lib = _library(x_TSD, y_TD, post_TS, comb_TSS)
    if lib is None:
        mixed_TSD = torch.matmul(comb_TSS.mT, x_TSD.float())
        x_TSD.copy_(torch.addcmul(mixed_TSD, post_TS[:, :, None], y_TD.float()[:, None]))
        return
    assert x_TSD.dtype == y_TD.dtype
    at = x_TSD.data_ptr(), y_TD.data_ptr(), post_TS.data_ptr(), comb_TSS.data_ptr()
    call = _STREAMS.pack(*at, *x_TSD.shape, DTYPES[x_TSD.dtype])
    lib.nd_mix_streams(isa, torch.get_num_threads(), call)


def join_parts(
    a_THD: Tensor,
    sums_TH: Tensor,
    sinks_H: Tensor,
    b_THD: Tensor | None = None,
    b_sums_TH: Tensor | None = None,
    counts_T: Tensor | None = None,
    *,
    isa: cpu.Isa = cpu.Isa.BEST,
) -> None:
    """Attention over disjoint rows, and a sink, becomes one in `a_THD`, in fp32 and rounded once.

    a = (e^sums * a + e^b_sums * b) / (e^sums + e^b_sums + e^sinks), without b, whatever it holds, for tokens whose
    `counts_T` (int32) is 0. Sums and sinks are fp32.
    """
    parts = [a_THD, sums_TH, sinks_H]
    if b_THD is not None:
        assert b_sums_TH is not None
        assert counts_T is not None
        assert counts_T.dtype == torch.int32
        assert b_THD.dtype == a_THD.dtype
        parts += [b_THD, b_sums_TH]
    if _on_gpu(*parts):
        gpu.compress.join_parts(a_THD, sums_TH, sinks_H, b_THD, b_sums_TH, counts_T)
        return
    lib = _library(*parts)
    if lib is not None:
        others = [0 if x is None else x.data_ptr() for x in (b_THD, b_sums_TH, counts_T)]
        at = a_THD.data_ptr(), others[0], sums_TH.data_ptr(), others[1], sinks_H.data_ptr(), others[2]
        call = _JOIN.pack(*at, *a_THD.shape, DTYPES[a_THD.dtype])
        lib.nd_join_parts(isa, torch.get_num_threads(), call)
        return
    if b_THD is None or b_sums_TH is None or counts_T is None:
        a_THD.mul_((sums_TH - sinks_H).sigmoid()[..., None])
        return
    none_T1 = (counts_T == 0)[:, None]
    b_sums_TH = b_sums_TH.masked_fill(none_T1, float("-inf"))
    logits_TH3 = torch.stack((sums_TH, b_sums_TH, sinks_H.expand_as(sums_TH)), -1)
    share_TH3 = logits_TH3.softmax(-1)
    b_THD = b_THD.masked_fill(none_T1[..., None], 0.0)
    a_THD.copy_(share_TH3[..., :1] * a_THD + share_TH3[..., 1:2] * b_THD)


def _on_gpu(*tensors: Tensor) -> bool:
    return gpu.enabled(tensors[0]) and all(t.is_contiguous() for t in tensors)


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, where they can do these: contiguous, on the CPU."""
    fit = all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in DTYPES for t in tensors)
    return cpu.library() if fit else None
