"""Grouped-query attention on NVIDIA GPUs by FlashInfer's paged kernels.

    plan(ctx)      on the host, from the step's lengths and tables: one copy to the GPU, nothing waits for the GPU
    attend(...)    in each layer, and in recorded steps: launches what was planned

Sequences at a step's start with one new token each (decode) and the others are two launches. One new token of a few
sequences goes to XQA, where it has a kernel (Hopper, no 8-bit cache, no window). Other few new tokens, drafts to
check among them, go to our own kernel (`common.kernels.gpu.paged_attention`), which shares any mix of lengths evenly
over the GPU, is the faster one from four sequences on and for an 8-bit cache, and serves small heads too. Neither
needs a plan on the host. Many new tokens go to `fa3`, where it can (Hopper, no 8-bit cache), else to `fa2`; which
stands in for our kernel, too, where Triton is missing: it packs the query heads of a key head into one tile and splits
long keys.

A recorded step (`ctx.graph`) has launches of a fixed shape whose arrays lie in memory that is filled again before
each replay. That memory, like the workspace of partial results, is shared by all recorded steps: they run one after
another on one stream. Copies read pinned memory, a piece of which is used again only once its copy is done.

The number of heads is not known before the first layer of the first step: that one plans for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.attention import flashinfer_modules
from common.attention.capability import Capability, Needs
from common.attention.context import DTYPES, AttentionContext, GroupTables, HostLengths
from common.attention.flashinfer_modules import Launch, Module
from common.attention.flashinfer_parts import Few, One, Paged, Part, lay_out
from common.attention.flashinfer_plan import Cut, Heads, Ints, Pages
from common.attention.flashinfer_xqa import Xqa, XqaSpace, can_run_on
from common.attention.reference import RecordableBackend
from common.attention.staging import Staging
from common.kernels import gpu
from common.kvcache.scales import KVScales

if TYPE_CHECKING:
    from common.kernels.gpu.paged_attention import Workspace

HEAD_DIMS = (64, 128, 256)
SMALL_HEAD_DIMS = (16, 32)  # of models for tests: our own kernel's, and the reference's where new tokens are many
MAX_ROWS = 64  # new tokens times query heads of a key head, up to which they are a tile of our own kernel
XQA_SEQUENCES = 3  # up to which XQA is faster than our kernel (benchmarks/LOG.md, 2026-11-26)
MANY_NEW_TOKENS = 64  # a sequence's, on average, from which on tiles of one query head are full enough

_Key = tuple[str, int]  # group, first position that holds something


def capability() -> Capability:
    floats = ("bfloat16", "float16")
    return Capability(
        "flashinfer",
        devices=("cuda",),
        dtypes=floats,
        kv_dtypes=(*floats, "float8_e4m3fn"),
        head_dims=(*HEAD_DIMS, *(() if gpu.unavailable() else SMALL_HEAD_DIMS)),
        unavailable=flashinfer_modules.missing(),
    )


def prepare(needs: Needs) -> None:
    """Compile what is not there yet, all at once."""
    if needs.head_dim not in HEAD_DIMS:
        return
    modules = flashinfer_modules.wanted(
        DTYPES[needs.dtype],
        DTYPES[needs.kv_dtype],
        needs.head_dim,
        windows=needs.has_windows,
        drafts=False,  # a draft layer's first step compiles what no other layer has
        hopper=_is_hopper(),
    )
    one = Xqa(DTYPES[needs.dtype], needs.head_dim, needs.group_size, needs.block_size)
    can = _is_hopper() and needs.kv_dtype == needs.dtype and one.can
    flashinfer_modules.build_missing([*modules, *([one] if can else [])])


@dataclass(frozen=True)
class _Shape:
    """What a layer's tensors say that a step does not. `dtype`: of the kernels, the cache's unless that is 8-bit."""

    heads: Heads
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


class FlashInferBackend(RecordableBackend):
    """Latent attention is not declared: what the protocol asks for it is the reference's."""

    name = "flashinfer"

    def __init__(self, own_kernel: bool = True, xqa: bool = True) -> None:
        """`own_kernel`: for few new tokens. `xqa`: for one, in few sequences. Without them `fa2` does that work."""
        self._own_kernel = own_kernel and not gpu.unavailable()
        device = torch.cuda.current_device()
        self.takes_xqa = xqa and _is_hopper() and can_run_on(device)
        self._shapes: dict[_Key, _Shape] = {}
        self._recorded: dict[tuple[_Key, int, int], Paged] = {}
        self._spaces: dict[tuple[int, ...], Workspace] = {}
        self._xqa_space: XqaSpace | None = None
        self._memory: dict[object, Tensor] = {}
        self._staging = Staging()
        self._latest: AttentionContext | None = None
        self._num_slots = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self._hopper = _is_hopper()

    def plan(self, ctx: AttentionContext) -> None:
        """Prepare the launches of a step. `ctx.host` and tables on the host are needed in recorded steps."""
        self._latest = ctx
        for name, tables in ctx.groups.items():
            if (name, tables.first) in self._shapes:
                self._plan_group(name, tables, ctx)

    def attend(
        self,
        q_THD: Tensor,
        cache: Tensor,
        tables: GroupTables,
        ctx: AttentionContext,
        scale: float,
        scales: KVScales | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens over the cache: a new [T, H, D]."""
        assert (scales is not None) == (cache.dtype == torch.float8_e4m3fn)
        name = next(name for name, group in ctx.groups.items() if group is tables)
        parts = self._launches(name, tables, ctx)
        if parts is None:
            parts = self._plan_for_itself(name, tables, ctx, q_THD, cache)
        if not parts:
            return super().attend(q_THD, cache, tables, ctx, scale, scales)
        k, v, v_scale = cache[:, 0], cache[:, 1], 1.0
        if scales is not None:
            scale, v_scale = scale * scales.k, scales.v
        dtype = self._shapes[name, tables.first].dtype
        query_THD = q_THD.to(dtype)
        out_THD = torch.empty(q_THD.shape, dtype=dtype, device=q_THD.device)
        for part in parts:
            part.run(query_THD[part.tokens], k, v, out_THD[part.tokens], scale, v_scale)
        return out_THD.to(q_THD.dtype)

    def _launches(self, name: str, tables: GroupTables, ctx: AttentionContext) -> list[Part] | None:
        key = (name, tables.first)
        found: list[Part] | None = ctx.scratch.get((FlashInferBackend, key))
        if found is None and ctx.graph and key in self._shapes:
            few = self._plan_few(self._shapes[key], tables, ctx, (0, ctx.graph), ctx.max_query_len)
            if few is not None:
                found = [few]
            elif (recorded := self._recorded.get((key, ctx.graph, ctx.max_query_len))) is not None:
                found = [recorded]
            ctx.scratch[FlashInferBackend, key] = found
        return found

    def _plan_for_itself(
        self, name: str, tables: GroupTables, ctx: AttentionContext, q_THD: Tensor, cache: Tensor
    ) -> list[Part]:
        assert not torch.cuda.is_current_stream_capturing(), "a step is recorded that was never run"
        dtype = q_THD.dtype if cache.dtype == torch.float8_e4m3fn else cache.dtype
        heads = Heads(q_THD.shape[1], cache.shape[2])
        self._shapes[name, tables.first] = _Shape(heads, q_THD.shape[2], dtype, cache.dtype)
        planned = self._latest if self._latest is not None and ctx.graph else ctx
        assert planned.graph == ctx.graph
        self._plan_group(name, planned.groups[name], planned)
        parts = self._launches(name, tables, ctx)
        assert parts is not None
        return parts

    def _plan_group(self, name: str, tables: GroupTables, ctx: AttentionContext) -> None:
        key = (name, tables.first)
        shape = self._shapes[key]
        if ctx.graph and self._is_few(shape, tables, ctx.graph, ctx.max_query_len):
            return  # the step works it out itself
        host, tables_SB = _lengths(ctx), _host_tables(tables)
        starts_S1, lens_S = host.query_starts_S1, host.seq_lens_S
        if ctx.graph:
            pages = Pages.of(tables_SB, starts_S1, lens_S, tables.block_size, tables.window)
            self._plan_fa2(shape, pages, tables, slice(None), recorded=(key, ctx.graph, ctx.max_query_len))
            return
        parts: list[Part] = []
        for first, end in _runs(np.diff(starts_S1)):
            part_starts = starts_S1[first : end + 1]
            tokens = slice(int(part_starts[0]), int(part_starts[-1]))
            counts_S = np.diff(part_starts)
            most = int(counts_S.max())
            if not most:
                continue
            few = None
            if most == counts_S.min():
                few = self._plan_few(shape, tables, ctx, (first, end), most, tokens)
            if few is not None:
                parts.append(few)
                continue
            if shape.head_dim not in HEAD_DIMS:
                parts.clear()  # all is the reference's
                break
            pages = Pages.of(tables_SB[first:end], part_starts, lens_S[first:end], tables.block_size, tables.window)
            mean = (tokens.stop - tokens.start) // (end - first)
            plan = self._plan_fa3 if self._takes_fa3(shape, tables, mean) else self._plan_fa2
            parts.append(plan(shape, pages, tables, tokens))
        ctx.scratch[FlashInferBackend, key] = parts

    def _is_few(self, shape: _Shape, tables: GroupTables, num_sequences: int, num_new: int) -> bool:
        return self._takes_xqa(shape, tables, num_sequences, num_new) or self._takes_own(shape, num_new)

    def _takes_xqa(self, shape: _Shape, tables: GroupTables, num_sequences: int, num_new: int) -> bool:
        """It would read blocks that a window gave back."""
        plain = shape.kv_dtype == shape.dtype and not tables.first and not tables.window
        few = num_new == 1 and num_sequences <= XQA_SEQUENCES
        return self.takes_xqa and few and plain and _xqa_module(shape, tables).can

    def _takes_own(self, shape: _Shape, num_new: int) -> bool:
        rows = num_new * shape.heads.group
        return self._own_kernel and rows <= MAX_ROWS if shape.head_dim in HEAD_DIMS else rows <= 2 * MAX_ROWS

    def _plan_few(
        self,
        shape: _Shape,
        tables: GroupTables,
        ctx: AttentionContext,
        sequences: tuple[int, int],
        num_new: int,
        tokens: slice = slice(None),
    ) -> Few | One | None:
        """What needs no plan on the host; None where that is nothing."""
        lens_S = ctx.seq_lens_S[sequences[0] : sequences[1]]
        tables_SB = tables.block_tables_SB[sequences[0] : sequences[1]]
        if not self._takes_xqa(shape, tables, len(lens_S), num_new):
            own = self._takes_own(shape, num_new)
            return self._plan_own(shape, tables, tables_SB, lens_S, num_new, tokens) if own else None
        if self._xqa_space is None:
            self._xqa_space = XqaSpace.make(lens_S.device)
        return One(tokens, _xqa_module(shape, tables), tables_SB, lens_S, self._xqa_space)

    def _plan_own(
        self, shape: _Shape, tables: GroupTables, tables_SB: Tensor, lens_S: Tensor, num_new: int, tokens: slice
    ) -> Few:
        own, device = gpu.paged_attention, tables.slots_T.device
        units, rows = shape.heads.num_kv_heads, num_new * shape.heads.group
        slots = own.num_slots(units, device)
        most = max(1024, 1 << (len(lens_S) - 1).bit_length())
        key = (units, shape.head_dim, rows, most)
        if key not in self._spaces:
            self._spaces[key] = own.workspace(most, units, shape.head_dim, rows, slots, device)
        seen = own.Seen(num_new, tables.window, tables.first)
        items = own.schedule(lens_S, seen, shape.head_dim, slots)
        return Few(tokens, tables_SB, seen, items, self._spaces[key])

    def _takes_fa3(self, shape: _Shape, tables: GroupTables, mean_new_tokens: int) -> bool:
        plain = shape.kv_dtype == shape.dtype and not tables.first
        return self._hopper and plain and mean_new_tokens >= MANY_NEW_TOKENS

    def _plan_fa2(
        self, shape: _Shape, pages: Pages, tables: GroupTables, tokens: slice, recorded: tuple[Any, ...] | None = None
    ) -> Paged:
        cut = Cut.of(pages, shape.heads, shape.head_dim, tables.window, self._num_slots, fixed=recorded is not None)
        num_sequences = len(pages.last_S)
        head = cut.num_ints
        used = head + 3 * num_sequences + 2 + len(pages.block_ids_N)
        staged = self._staging.take(used)
        info = cut.write(staged.array)
        views = lay_out(pages, staged.array, head)
        known = self._recorded.get(recorded) if recorded is not None else None
        if known is not None:
            staged.send(known.launch.ints.view(torch.int32)[:used])
            return known
        last = len(pages.block_ids_N)
        if recorded is None:
            target = torch.empty(used, dtype=torch.int32, device=tables.slots_T.device)
        else:
            last = tables.block_tables_SB.numel()
            target = self._lasting(recorded[0], used - len(pages.block_ids_N) + last, tables.slots_T.device)
        staged.send(target[:used])
        heads, item = shape.heads.num_heads, shape.dtype.itemsize
        info[11] = (cut.num_parts * heads * shape.head_dim * item + 15) // 16 * 16
        room = info[11] + cut.num_parts * heads * 4 + 16
        if recorded is None:
            floats = torch.empty(room, dtype=torch.uint8, device=target.device)
        else:
            floats = self._lasting("partial results", room // 4 + 1, target.device).view(torch.uint8)
        module = Module("fa2", shape.dtype, shape.kv_dtype, shape.head_dim, tables.window > 0, first=tables.first > 0)
        launch = Launch(module, _vector(info), target.view(torch.uint8), floats, tables.window, tables.first)
        starts, blocks, lasts, ids = views
        part = Paged(tokens, (target[starts], target[blocks], target[ids : ids + last], target[lasts]), launch)
        if recorded is not None:
            self._recorded[recorded] = part
        return part

    def _plan_fa3(self, shape: _Shape, pages: Pages, tables: GroupTables, tokens: slice) -> Paged:
        """FlashInfer's own plan: it sorts the work over the GPU by a heap, and copies from memory that we give it."""
        device, num_sequences = tables.slots_T.device, len(pages.last_S)
        used = 3 * num_sequences + 2 + len(pages.block_ids_N)
        staged = self._staging.take(used)
        starts, blocks, lasts, ids = lay_out(pages, staged.array, 0)
        target = torch.empty(used, dtype=torch.int32, device=device)
        staged.send(target)
        heads, dim = shape.heads, shape.head_dim
        module = Module("fa3", shape.dtype, shape.kv_dtype, dim, tables.window > 0)
        tile = 192 if dim == 64 else 128
        works = heads.num_heads * int((-(-np.diff(pages.query_starts_S1) // tile)).sum())
        ints = torch.empty(7 * 4 * (works + 8) + 4 * (self._num_slots + 8), dtype=torch.uint8, device=device)
        pinned = self._staging.take(ints.numel() // 4)
        floats = torch.empty(16, dtype=torch.uint8, device=device)
        info = flashinfer_modules.function(module, "plan")(
            floats,
            ints,
            pinned.tensor.view(torch.uint8),
            *(torch.from_numpy(a) for a in (pages.query_starts_S1, pages.block_starts_S1, pages.kv_lens_S)),
            int(pages.query_starts_S1[-1]),
            num_sequences,
            heads.num_heads,
            heads.num_kv_heads,
            tables.block_size,
            False,  # not for a graph
            dim,
            dim,
            True,  # causal
            tables.window - 1,
        )
        pinned.sent()
        launch = Launch(module, info, ints, floats, tables.window, 0)
        return Paged(tokens, (target[starts], target[blocks], target[ids:], target[lasts]), launch)

    def _lasting(self, key: object, num_ints: int, device: torch.device) -> Tensor:
        """Memory for recorded steps; a larger one takes its place, which those recorded before keep."""
        memory = self._memory.get(key)
        if memory is None or memory.numel() < num_ints:
            memory = self._memory[key] = torch.empty(num_ints, dtype=torch.int32, device=device)
        return memory


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def _xqa_module(shape: _Shape, tables: GroupTables) -> Xqa:
    return Xqa(shape.dtype, shape.head_dim, shape.heads.group, tables.block_size)


def _runs(counts_S: Ints) -> Sequence[tuple[int, int]]:
    """Sequences that are one launch: those before the first with more than one new token, and from there on."""
    more = counts_S > 1
    lead = int(more.argmax()) if more.any() else len(counts_S)
    return [run for run in ((0, lead), (lead, len(counts_S))) if run[0] < run[1]]


def _lengths(ctx: AttentionContext) -> HostLengths:
    if ctx.host is not None:
        return ctx.host
    assert not ctx.graph
    return HostLengths(ctx.query_starts_S1.cpu().numpy(), ctx.seq_lens_S.cpu().numpy())


def _host_tables(tables: GroupTables) -> Ints:
    if tables.host_tables_SB is not None:
        return tables.host_tables_SB
    found: Ints = tables.block_tables_SB.cpu().numpy()
    return found


def _vector(values: list[int]) -> Any:
    """An array of FlashInfer's calls, made once rather than in each."""
    import tvm_ffi

    return tvm_ffi.convert(values)
