"""Attention of DeepSeek-V4 (section 2.3): a window of rows, compressed entries beside it, and sinks.

    q = norm(wq_b(q_norm(wq_a(x)))) per head         row = kv_norm(wkv(x)), key and value of all heads
    out = attention over the window's rows and some entries, turned back; wo_b(wo_a of each group of heads)

A key is a value, so a value has been turned by its position; turning the output back by the query's leaves what depends
on their distance. In a sparse layer the indexer, which has compressed keys of its own, chooses among the entries.

Shape letters: T new tokens, H heads of this rank, D head width, G groups of heads, R width of a group's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from common.attention.compressed import attend
from common.kernels import gpu
from common.kernels.ops import linear_heads, rms_norm
from common.kvcache.layout import KVPlace
from common.layers.base import Build, Init, Layer, Slot
from common.layers.compress_spec import WINDOW_ROWS, CompressSpec
from common.layers.compressor import turn_tail_
from common.layers.entries import COMPRESS_ROPE, HeavyEntries, SparseEntries
from common.layers.fp8_weight import exact
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.rms_norm import RMSNorm
from common.layers.rope import apply_rope_
from common.layers.step import MAIN_ROPE, Rotation, Step


def back(rope: str) -> str:
    """Name of the rotation that undoes another: (cos, -sin)."""
    return f"{rope} back"


class CompressedAttention(Layer):
    """Checkpoint names under `attn.`. `places`: where each region of this layer lies."""

    can_record = not gpu.unavailable()
    """On a GPU: does it launch the same work for the same shapes? In torch nothing is pooled into no entry."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        spec: CompressSpec,
        layer_idx: int,
        places: Mapping[str, KVPlace],
        eps: float,
    ) -> None:
        kind = spec.kinds[layer_idx]
        self._window = places[WINDOW_ROWS]
        self._rope = MAIN_ROPE if kind == "window" else COMPRESS_ROPE
        self._rank, self._width, self._eps = spec.q_rank, head_dim, eps
        self._head, self._heads = build.tp.share(num_heads)
        self._num_heads = num_heads
        self._ones = torch.ones(head_dim, dtype=build.dtype, device=build.device)
        self._sinks_H = torch.empty(self._heads, device=build.device)
        self.a_proj = ColumnLinear(build, hidden_size, {"wq_a": (1, spec.q_rank), "wkv": (1, head_dim)}, bias=False)
        self.q_norm = RMSNorm(build, spec.q_rank, eps)
        self.q_b_proj = ColumnLinear(build, spec.q_rank, {"wq_b": (num_heads, head_dim)}, bias=False)
        self.kv_norm = RMSNorm(build, head_dim, eps)
        self.entries: SparseEntries | HeavyEntries | None = None
        if kind != "window":
            made = SparseEntries if kind == "sparse" else HeavyEntries
            self.entries = made(build, hidden_size, head_dim, spec, places, eps)
        groups, width = spec.out_groups, num_heads // spec.out_groups * head_dim
        self.o_a_proj = ColumnLinear(exact(build), width, {"wo_a": (groups, spec.out_rank)}, bias=False)
        self.wo_b = RowLinear(build, groups, spec.out_rank, hidden_size, bias=False)
        self._wo_a_GRK = self.o_a_proj.weight.view(-1, spec.out_rank, width)

    def own_slots(self) -> Iterator[Slot]:
        yield Slot("attn_sink", self._sinks_H, (self._num_heads,), start=self._head, init=Init.ZEROS)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        ctx, num_tokens, width = step.ctx, x_TD.shape[0], self._width
        turn = step.rope[self._rope]
        a_T = self.a_proj(x_TD)
        q_TR = self.q_norm(a_T[:, : self._rank])
        q_THD = rms_norm(self.q_b_proj(q_TR).view(num_tokens, self._heads, width), self._ones, self._eps)
        turn_tail_(q_THD, turn)
        row_TD = self.kv_norm(a_T[:, self._rank :])
        turn_tail_(row_TD[:, None], turn)
        cache, tables = step.cache(self._window), step.tables(self._window)
        ctx.backend.write_rows(row_TD, cache, tables)
        seen = None if self.entries is None else self.entries(x_TD, q_TR, step)
        out_THD = attend(q_THD, cache[:, 0, 0], tables, self._sinks_H, ctx, width**-0.5, seen)
        turn_tail_back_(out_THD, step.rope[back(self._rope)])
        out_TGR = linear_heads(out_THD.view(num_tokens, -1, self._wo_a_GRK.shape[2]), self._wo_a_GRK)
        return self.wo_b(out_TGR.flatten(1))


def turn_tail_back_(x_THD: Tensor, turn: Rotation) -> None:
    """The reverse of `turn_tail_`, order included. `turn`: (cos, -sin) of what is undone."""
    cos, sin = turn
    tail = x_THD[..., -cos.shape[-1] :]
    apply_rope_(tail, cos, sin, interleaved=False)
    low, high = tail.chunk(2, -1)
    tail.copy_(torch.stack((low, high), -1).flatten(-2))
