"""Multi-head latent attention (DeepSeek-V2, section 2.1): what is cached of a token is one narrow row.

    q = q_b_proj(norm(q_a_proj(x)))                 per head [nope | rope]; or q_proj(x)
    row = [norm(latent) | rope key], of kv_a_proj_with_mqa(x), the same for all heads
    k, v of a head = [kv_b_proj_k(latent) | rope key], kv_b_proj_v(latent)

Few new tokens of a sequence are *absorbed*: kv_b_proj_k moves to the query's side, q . (W latent) = (W^T q) . latent,
and kv_b_proj_v behind the sum over positions, so that rows are read as they are. Many are *expanded*: keys and values
of the whole sequence are made from its rows, some heads at a time, and attention is ordinary. The two differ in
rounding only. See `common.attention.latent` for who goes which way.

In an 8-bit cache rows are packed (`common.kvcache.packing`) as they are written and everything reads what is left of
them, a prompt's own tokens included. A rounding may there become a step of 8 bits in a later layer's row, rarely.

Shape letters: T new tokens, N those of a part, H heads of this rank, D width of a query, R latent width, V value width,
P positions gathered, G heads expanded at once, E width of what is expanded for a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention.context import Selection
from common.attention.latent import Part, Parts, split
from common.attention.ragged import RaggedBackend
from common.kernels import gpu
from common.kernels.ops import linear, linear_heads
from common.kvcache.layout import KVPlace
from common.kvcache.packing import RowPacking
from common.layers.base import Build, Layer
from common.layers.fp8_weight import exact
from common.layers.indexer import SELECTION, Indexer
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.mla_spec import MLASpec
from common.layers.rms_norm import RMSNorm
from common.layers.rope import apply_rope_
from common.layers.step import MAIN_ROPE, Step

_ANY = 1 << 30  # with a fixed order, so that a prompt's tokens get what they would get one by one
_MAX_ELEMENTS = 1 << 23
_MAX_POSITIONS = 1 << 16  # of several sequences that are expanded on a GPU at once
MAX_ABSORBED = 64  # new tokens of a sequence; with more, expanding pays at DeepSeek's widths (bfloat16; fp32: 256)


class MLA(Layer):
    """`place`: where rows lie, one part and unit of width R + rope. `top_k`: positions a query sees, 0 for all; they
    are chosen by `indexer`, or, without one, by that of an earlier layer.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        num_heads: int,
        spec: MLASpec,
        place: KVPlace,
        *,
        indexer: Indexer | None = None,
        top_k: int = 0,
    ) -> None:
        self._spec = spec
        self._place = place
        self._top_k = top_k
        self._fixed = build.fixed and build.device.type == "cuda"  # on the CPU all orders are
        heads = self._heads = build.tp.share(num_heads)[1]
        row, rank, qk = {"kv_a_proj_with_mqa": (1, spec.row_dim)}, spec.q_lora_rank, spec.qk_dim
        if rank:
            self.a_proj = ColumnLinear(build, hidden_size, {"q_a_proj": (1, rank)} | row, bias=spec.bias)
            self.q_a_layernorm = RMSNorm(build, rank, spec.norm_eps)
            self.q_b_proj = ColumnLinear(build, rank, {"q_b_proj": (num_heads, qk)}, bias=False)
        else:
            queries = {} if spec.bias else {"q_proj": (num_heads, qk)}  # which has no bias
            self.a_proj = ColumnLinear(build, hidden_size, queries | row, bias=spec.bias)
            if spec.bias:
                self.q_proj = ColumnLinear(build, hidden_size, {"q_proj": (num_heads, qk)}, bias=False)
        self.kv_a_layernorm = RMSNorm(build, spec.kv_lora_rank, spec.norm_eps)
        parts = {"kv_b_proj": (num_heads, spec.nope_dim + spec.v_dim)}
        self.kv_b_proj = ColumnLinear(exact(build), spec.kv_lora_rank, parts, bias=False)
        self._kv_b_HER = self.kv_b_proj.weight.view(heads, -1, spec.kv_lora_rank)  # rows of keys, then of values
        self._to_latent_HRD = build.empty(heads, spec.kv_lora_rank, spec.nope_dim)
        self.o_proj = RowLinear(build, num_heads, spec.v_dim, hidden_size, bias=spec.bias)
        self.indexer = indexer

    def derive_own(self) -> None:
        """Absorbed queries need kv_b_proj's key part the other way round."""
        self._to_latent_HRD.copy_(self._kv_b_HER[:, : self._spec.nope_dim].transpose(1, 2))

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        spec, ctx, tables = self._spec, step.ctx, step.tables(self._place)
        rows = step.cache(self._place)
        parts = split(tables, ctx, _ANY if self._fixed else MAX_ABSORBED, self._top_k)
        q_TR, q_THD, row_TW = self._project(x_TD)
        q_THW = self._latent_queries(q_THD, parts)
        self._store(q_THD, row_TW, rows, step, q_THW)
        if self.indexer is not None:
            self.indexer(x_TD, q_TR, step, parts.sparse)
        done: list[tuple[Part, Tensor]] = []
        if parts.absorbed is not None:
            done.append((parts.absorbed, self._absorbed(q_THD, q_THW, rows, parts.absorbed)))
        if parts.expanded is not None:
            done.append((parts.expanded, self._expanded(q_THD, row_TW, rows, parts.expanded)))
        if parts.sparse is not None:
            done.append((parts.sparse, self._absorbed(q_THD, q_THW, rows, parts.sparse, step.shared[SELECTION])))
        if len(done) == 1:
            out_THV = done[0][1]
        else:
            out_THV = q_THD.new_empty(x_TD.shape[0], self._heads, spec.v_dim)
            for part, out_NHV in done:
                out_THV[part.tokens] = out_NHV
        return self.o_proj(out_THV.reshape(x_TD.shape[0], -1))

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(query latent, queries, rows), before the rows' norm and before they turn."""
        spec, shape = self._spec, (x_TD.shape[0], self._heads, self._spec.qk_dim)
        a_T = self.a_proj(x_TD)
        q_T, row_TW = a_T[:, : -spec.row_dim], a_T[:, -spec.row_dim :]
        if spec.q_lora_rank:
            q_T = self.q_a_layernorm(q_T)
            return q_T, self.q_b_proj(q_T).view(shape), row_TW
        return q_T, (self.q_proj(x_TD) if spec.bias else q_T).view(shape), row_TW

    def _latent_queries(self, q_THD: Tensor, parts: Parts) -> Tensor | None:
        """The queries in latent space on a GPU, where all tokens go that way at once: [T, H, W], of which what turns is
        still to be put in.
        """
        whole = gpu.enabled(q_THD) and parts.expanded is None and (parts.absorbed is None or parts.sparse is None)
        if not whole or q_THD.shape[0] > self._at_once(q_THD):
            return None
        return self._to_latent(q_THD)

    def _store(self, q_THD: Tensor, row_TW: Tensor, rows: Tensor, step: Step, q_THW: Tensor | None) -> None:
        """Norm and turn the rows, and store them; turn the queries, in place or into `q_THW`."""
        spec, rank, (cos, sin) = self._spec, self._spec.kv_lora_rank, step.rope[MAIN_ROPE]
        tables, packing, turning_THD = step.tables(self._place), self._packing_of(rows), q_THD[..., spec.nope_dim :]
        if gpu.enabled(row_TW):
            gpu.rows.store_rows(
                row_TW,
                rows,
                tables.slots_T,
                rank,
                packed=packing is not None,
                norm=(self.kv_a_layernorm.weight, spec.norm_eps),
                rotation=(cos, sin),
                interleaved=spec.interleaved,
                turned=gpu.rows.Turned(turning_THD, turning_THD if q_THW is None else q_THW[..., rank:]),
            )
            return
        apply_rope_(turning_THD, cos, sin, interleaved=spec.interleaved)
        row_TW[:, :rank] = self.kv_a_layernorm(row_TW[:, :rank])
        apply_rope_(row_TW[:, None, rank:], cos, sin, interleaved=spec.interleaved)
        step.ctx.backend.write_rows(row_TW, rows, tables, packing)

    def _at_once(self, q_THD: Tensor) -> int:
        """Tokens whose absorbed queries fit in what may be used."""
        return max(1, _max_elements(q_THD) // (self._heads * self._spec.row_dim))

    def _packing_of(self, rows: Tensor) -> RowPacking | None:
        return self._spec.packing if rows.dtype == torch.uint8 else None

    def _absorbed(
        self, q_THD: Tensor, q_THW: Tensor | None, rows: Tensor, part: Part, selected: Selection | None = None
    ) -> Tensor:
        """`q_THW`: holds the turned part of all queries, where the part is the whole step."""
        q_NHD = part.take(q_THD)
        out_NHV = q_NHD.new_empty(*q_NHD.shape[:2], self._spec.v_dim)
        bands = part.bands(self._at_once(q_THD))
        for band in bands:
            some = selected
            if selected is not None and len(bands) > 1:
                assert isinstance(band.tokens, slice)
                some = selected.take(band.tokens)
            self._absorb(band.take(q_NHD), q_THW, rows, band, some, band.take(out_NHV))
        return out_NHV

    def _absorb(
        self,
        q_NHD: Tensor,
        q_NHW: Tensor | None,
        rows: Tensor,
        part: Part,
        selected: Selection | None,
        out_NHV: Tensor,
    ) -> None:
        spec, rank = self._spec, self._spec.kv_lora_rank
        if q_NHW is None:
            q_NHW = self._to_latent(q_NHD)
            q_NHW[..., rank:] = q_NHD[..., spec.nope_dim :]
        latent_NHR = part.ctx.backend.attend_rows(
            q_NHW,
            rows[:, 0],
            slice(0, rank),
            part.tables,
            part.ctx,
            spec.scale,
            selected,
            packing=self._packing_of(rows),
        )
        linear_heads(latent_NHR, self._kv_b_HER[:, spec.nope_dim :], out_NHV, fixed=self._fixed)

    def _to_latent(self, q_NHD: Tensor) -> Tensor:
        spec, rank = self._spec, self._spec.kv_lora_rank
        q_NHW = q_NHD.new_empty(*q_NHD.shape[:2], spec.row_dim)
        linear_heads(q_NHD[..., : spec.nope_dim], self._to_latent_HRD, q_NHW[..., :rank], fixed=self._fixed)
        return q_NHW

    def _expanded(self, q_THD: Tensor, row_TW: Tensor, rows: Tensor, part: Part) -> Tensor:
        spec, rank, backend = self._spec, self._spec.kv_lora_rank, part.ctx.backend
        q_NHD = part.take(q_THD)
        out_NHV = q_NHD.new_empty(*q_NHD.shape[:2], spec.v_dim)
        if isinstance(backend, RaggedBackend) and backend.ragged.able(q_NHD.dtype, spec.qk_dim, spec.v_dim):
            row_NW = part.take(row_TW)
            for lot in part.lots(_MAX_POSITIONS):
                self._expand_ragged(lot.take(q_NHD), lot.take(row_NW), rows, lot, backend, lot.take(out_NHV))
            return out_NHV
        gathered = part.gathered
        row_PW = backend.read_rows(rows, gathered.block_ids_N, q_NHD.dtype, self._packing_of(rows))
        num_positions, width = row_PW.shape[0], spec.qk_dim + spec.v_dim
        at_once = max(1, min(self._heads, _max_elements(q_NHD) // (num_positions * width)))
        for first in range(0, self._heads, at_once):
            heads = slice(first, min(first + at_once, self._heads))
            weight_GR = self._kv_b_HER[heads].flatten(0, 1)
            kv_PGE = linear(row_PW[:, :rank], weight_GR).view(num_positions, -1, spec.nope_dim + spec.v_dim)
            blocks = _blocks_of(kv_PGE, row_PW[:, rank:], spec, part.tables.block_size)
            out_NHV[:, heads] = backend.attend_rows(
                q_NHD[:, heads], blocks, slice(spec.qk_dim, width), gathered.tables, part.ctx, spec.scale
            )
        return out_NHV

    def _expand_ragged(
        self, q_NHD: Tensor, row_NW: Tensor, rows: Tensor, part: Part, backend: RaggedBackend, out_NHV: Tensor
    ) -> None:
        """Keys and values without blocks. A prompt's own rows are read as they were made, if nothing else is."""
        spec, rank = self._spec, self._spec.kv_lora_rank
        row_PW = row_NW
        if not part.ragged.is_new or rows.dtype != row_NW.dtype:
            row_PW = backend.gather_rows(rows, part, q_NHD.dtype, self._packing_of(rows))
        num_positions, width = row_PW.shape[0], spec.qk_dim + spec.nope_dim + spec.v_dim
        at_once = self._heads
        while at_once % 2 == 0 and at_once * num_positions * width > _max_elements(q_NHD):
            at_once //= 2
        for first in range(0, self._heads, at_once):
            heads = slice(first, first + at_once)
            weight_GR = self._kv_b_HER[heads].flatten(0, 1)
            kv_PGE = linear(row_PW[:, :rank], weight_GR).view(num_positions, at_once, -1)
            k_PGD = gpu.rows.expand_keys(kv_PGE, row_PW[:, rank:], spec.nope_dim)
            v_PGV = kv_PGE[..., spec.nope_dim :]
            backend.ragged.attend(q_NHD[:, heads], k_PGD, v_PGV, part, spec.scale, out_NHV[:, heads])


def _max_elements(x: Tensor) -> int:
    """Of absorbed queries, or of expanded keys and values, at once: what caches of a CPU hold, and what fills a GPU."""
    return _MAX_ELEMENTS * (16 if x.is_cuda else 1)


def _blocks_of(kv_PGE: Tensor, rope_PD: Tensor, spec: MLASpec, block_size: int) -> Tensor:
    """Keys [nope | rope] and values side by side, a head's rows of a block in a row: [blocks, G, block_size, E]."""
    kv = kv_PGE.view(-1, block_size, *kv_PGE.shape[1:]).transpose(1, 2)
    out = kv.new_empty(*kv.shape[:3], spec.qk_dim + spec.v_dim)
    out[..., : spec.nope_dim] = kv[..., : spec.nope_dim]
    out[..., spec.nope_dim : spec.qk_dim] = rope_PD.view(-1, 1, block_size, spec.rope_dim)
    out[..., spec.qk_dim :] = kv[..., spec.nope_dim :]
    return out
