"""Mixture of experts: route, send, compute, add up, and add what the shared experts say.

Experts are packed, [gate | up] and down of all of them in one tensor each. A checkpoint holds them in one of three
forms, and never in a mixture:

    experts.N.gate_proj.weight [I, D], experts.N.up_proj.weight [I, D], experts.N.down_proj.weight [D, I]
    experts.gate_up_proj [E, 2 I, D], experts.down_proj [E, D, I]
    the same with the last two dimensions exchanged (Qwen3-VL's releases)

Over ranks each expert's intermediate size is split; the routed and the shared partial sums are added up once.

Shape letters: T tokens, E experts, K experts of a token, D hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels.expert_weights import ExpertWeights
from common.kernels.ops import linear, sigmoid_mul
from common.layers.base import Build, Holder, Init, Layer, Slot, share_size
from common.layers.fp8_weight import empty_weight, fits_blocks
from common.layers.mlp import SWIGLU_NAMES, SwiGLU, SwiGLUNames
from common.layers.moe_spec import MoESpec
from common.moe.dispatch import LocalDispatcher
from common.moe.experts import run_experts
from common.moe.routing import RoutingRule, choose, weigh

_SEPARATE, _FUSED, _TURNED = "one tensor per expert", "fused", "fused and transposed"


@dataclass(frozen=True)
class MoENames:
    """What a family's checkpoints call the parts of the layer; see `Router` and `Experts` for the rest."""

    expert: SwiGLUNames = SWIGLU_NAMES
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    correction_bias: str = "e_score_correction_bias"
    table: str = "tid2eid"


class Router(Layer):
    """Checkpoint names under `gate.`: `weight` [E, D], the correction bias [E], and a hash layer's table [V, K].

    `hash_vocab`: tokens of that table; 0 is no hash layer.
    """

    def __init__(self, build: Build, hidden_size: int, spec: MoESpec, names: MoENames, hash_vocab: int = 0) -> None:
        self._names = names
        self._rule = RoutingRule(
            top_k=spec.top_k,
            scoring=spec.scoring,
            normalized=spec.norm_topk_prob,
            scale=spec.routed_scaling_factor,
            num_groups=spec.num_groups,
            topk_groups=spec.topk_groups,
        )
        self._fixed = build.fixed
        experts, device = spec.num_experts, build.device
        dtype = torch.float32 if spec.router_fp32 else build.dtype
        self.weight = torch.empty(experts, hidden_size, dtype=dtype, device=device)
        self._multiplied = self.weight
        self._dtype = build.dtype
        has_bias = spec.correction_bias and not hash_vocab
        self.bias_E = torch.empty(experts, dtype=torch.float32, device=device) if has_bias else None
        table = torch.empty(hash_vocab, spec.top_k, dtype=torch.int64, device=device)
        self.table_VK = table if hash_vocab else None

    def own_slots(self) -> Iterator[Slot]:
        experts = self.weight.shape[0]
        yield Slot("weight", self.weight, tuple(self.weight.shape))
        if self.bias_E is not None:
            yield Slot(self._names.correction_bias, self.bias_E, (experts,), init=Init.ZEROS)
        if self.table_VK is not None:
            shape = tuple(self.table_VK.shape)
            yield Slot(self._names.table, self.table_VK, shape, init=Init.INDEX, num_values=experts)

    def derive_own(self) -> None:
        """On a GPU an fp32 weight whose numbers the model's type has too goes in that type: products stay fp32's."""
        short = self.weight.to(self._dtype)
        if self.weight.is_cuda and torch.equal(short.to(self.weight.dtype), self.weight):
            self._multiplied = short

    def __call__(self, x_TD: Tensor, input_ids_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """(expert ids int64 [T, K], weights fp32 [T, K]). A hash layer needs the tokens' ids."""
        logits_TE = linear(x_TD, self._multiplied, out_dtype=torch.float32, fixed=self._fixed)
        if self.table_VK is None:
            return choose(logits_TE, self._rule, self.bias_E)
        assert input_ids_T is not None, "a hash layer routes by token id"
        ids_TK = self.table_VK.index_select(0, input_ids_T)
        return ids_TK, weigh(logits_TE, self._rule, ids_TK)


@dataclass(frozen=True)
class _Part:
    """One of the matrices of an expert, or of all of them; its scales where it is in FP8."""

    values: Tensor
    scales: Tensor | None = None

    def of(self, expert: int) -> _Part:
        return _Part(self.values[expert], None if self.scales is None else self.scales[expert])

    def turned(self) -> _Part:
        return _Part(self.values.mT, None if self.scales is None else self.scales.mT)

    def slot(self, name: str, shape: tuple[int, ...], dim: int, start: int, form: str, holder: Holder) -> Slot:
        return Slot(name, self.values, shape, dim, start, form=form, scales=self.scales, holder=holder)


class Experts(Holder):
    """Checkpoint names under `experts.`. Gives the rank's partial sums."""

    def __init__(self, build: Build, hidden_size: int, spec: MoESpec, names: SwiGLUNames) -> None:
        first, count = build.tp.share(spec.intermediate_size)
        self._first, self._count, self._width = first, count, spec.intermediate_size
        self._names = names
        self._limit = spec.swiglu_limit
        self._fixed = build.fixed
        self._dispatcher = LocalDispatcher(spec.num_experts)
        self._hidden_size = hidden_size
        self.is_exact, self.wants_fp8 = build.exact, build.fp8_experts
        self.in_fp8 = build.fp8_experts and self.fits(build.tp.size)
        gate_up, gate_up_scales = empty_weight(build, self.in_fp8, spec.num_experts, 2 * count, hidden_size)
        down, down_scales = empty_weight(build, self.in_fp8, spec.num_experts, hidden_size, count)
        self.weights = ExpertWeights(gate_up, down, gate_up_scales, down_scales)

    def fits(self, ranks: int) -> bool:
        return fits_blocks(share_size(self._width, ranks), self._hidden_size)

    def hold_floats(self, dtype: torch.dtype) -> None:
        gate_up, down = (torch.empty_like(w, dtype=dtype) for w in self.weights[:2])
        self.weights, self.in_fp8 = ExpertWeights(gate_up, down), False

    def own_slots(self) -> Iterator[Slot]:
        yield from self._separate()
        yield from self._fused(_FUSED)
        yield from self._fused(_TURNED)

    def _separate(self) -> Iterator[Slot]:
        gate, up, down = self._parts()
        experts, hidden_size = down.values.shape[:2]
        wide, tall = (self._width, hidden_size), (hidden_size, self._width)
        for e in range(experts):
            for name, part in ((self._names.gate, gate), (self._names.up, up)):
                yield part.of(e).slot(f"{e}.{name}.weight", wide, 0, self._first, _SEPARATE, self)
            yield down.of(e).slot(f"{e}.{self._names.down}.weight", tall, 1, self._first, _SEPARATE, self)

    def _fused(self, form: str) -> Iterator[Slot]:
        gate, up, down = self._parts()
        experts, hidden_size = down.values.shape[:2]
        wide, tall = (experts, 2 * self._width, hidden_size), (experts, hidden_size, self._width)
        wide_dim, tall_dim = 1, 2
        if form == _TURNED:
            gate, up, down = gate.turned(), up.turned(), down.turned()
            wide, tall, wide_dim, tall_dim = (experts, *wide[:0:-1]), (experts, *tall[:0:-1]), 2, 1
        yield gate.slot("gate_up_proj", wide, wide_dim, self._first, form, self)
        yield up.slot("gate_up_proj", wide, wide_dim, self._width + self._first, form, self)
        yield down.slot("down_proj", tall, tall_dim, self._first, form, self)

    def _parts(self) -> tuple[_Part, _Part, _Part]:
        """Gate, up and down of all experts."""
        gate_up, down, gate_up_scales, down_scales = self.weights
        gate, up = gate_up.chunk(2, 1)
        if gate_up_scales is None:
            return _Part(gate), _Part(up), _Part(down)
        gate_scales, up_scales = gate_up_scales.chunk(2, 1)
        return _Part(gate, gate_scales), _Part(up, up_scales), _Part(down, down_scales)

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, added_TD: Tensor | None) -> Tensor:
        """A new [T, D], with `added_TD` in the sum."""
        return run_experts(
            self._dispatcher, x_TD, ids_TK, weights_TK, self.weights, self._limit, added_TD, fixed=self._fixed
        )


class MoE(Layer):
    """`hash_vocab`: size of the vocabulary where this layer routes by token id (`MoESpec.num_hash_layers`), else 0."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        spec: MoESpec,
        names: MoENames | None = None,
        *,
        hash_vocab: int = 0,
    ) -> None:
        names = names or MoENames()
        self._names = names
        self._tp = build.tp
        self._fixed = build.fixed
        self.gate = Router(build, hidden_size, spec, names, hash_vocab)
        self.experts = Experts(build, hidden_size, spec, names.expert)
        self._shared: SwiGLU | None = None
        if spec.shared_intermediate_size:
            size, limit = spec.shared_intermediate_size, spec.swiglu_limit
            self._shared = SwiGLU(build, hidden_size, size, limit=limit, names=names.expert, reduce=False)
        self._shared_gate_1D = build.empty(1, hidden_size) if spec.shared_gate else None

    def own_slots(self) -> Iterator[Slot]:
        if self._shared is not None:
            yield from self._shared.slots(f"{self._names.shared}.")
        if self._shared_gate_1D is not None:
            shape = tuple(self._shared_gate_1D.shape)
            yield Slot(f"{self._names.shared_gate}.weight", self._shared_gate_1D, shape)

    def __call__(self, x_TD: Tensor, input_ids_T: Tensor | None = None) -> Tensor:
        """A new [T, D]. `input_ids_T` int64 is read by a hash layer only."""
        shared_TD: Tensor | None = None
        if self._shared is not None:
            shared_TD = self._shared(x_TD)
            if self._shared_gate_1D is not None:
                gate_T1 = linear(x_TD, self._shared_gate_1D, out_dtype=torch.float32, fixed=self._fixed)
                shared_TD = sigmoid_mul(shared_TD, gate_T1)
        return self._tp.reduce(self.experts(x_TD, *self.gate(x_TD, input_ids_T), shared_TD))
