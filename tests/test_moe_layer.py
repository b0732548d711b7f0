"""The whole layer against transformers' modules: routed and shared experts, gates, clamps, naming; in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV4Config, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from common.layers.base import Build, TensorParallel
from common.layers.mlp import SwiGLUNames
from common.layers.moe import MoE, MoENames
from common.layers.moe_spec import MoESpec
from common.models.weights import choose_forms

D, W, E, K = 48, 24, 8, 3
CPU = torch.device("cpu")
SIZES = {"hidden_size": D, "moe_intermediate_size": W, "num_experts_per_tok": K}
QWEN_NEXT = MoENames(shared="shared_expert")
V4_NAMES = MoENames(SwiGLUNames("w1", "w3", "w2"), correction_bias="bias")


def spec(**fields: Any) -> MoESpec:
    return MoESpec(E, K, W, (True,), **fields)


def qwen3() -> tuple[nn.Module, MoESpec, MoENames, int]:
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, num_experts=E, norm_topk_prob=True)), spec(), MoENames(), 0


def qwen3_next() -> tuple[nn.Module, MoESpec, MoENames, int]:
    config = Qwen3NextConfig(**SIZES, num_experts=E, shared_expert_intermediate_size=40)
    ours = spec(shared_intermediate_size=40, shared_gate=True)
    return Qwen3NextSparseMoeBlock(config), ours, QWEN_NEXT, 0


def deepseek_v3() -> tuple[nn.Module, MoESpec, MoENames, int]:
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    config = DeepseekV3Config(**SIZES, **groups, n_routed_experts=E, n_shared_experts=2)
    ours = spec(
        scoring="sigmoid",
        correction_bias=True,
        router_fp32=True,
        num_groups=4,
        topk_groups=2,
        routed_scaling_factor=2.5,
        shared_intermediate_size=2 * W,
    )
    return DeepseekV3MoE(config), ours, MoENames(), 0


def deepseek_v4(kind: str = "moe") -> tuple[nn.Module, MoESpec, MoENames, int]:
    limits = {"swiglu_limit": 0.7, "routed_scaling_factor": 1.5}
    config = DeepseekV4Config(
        **SIZES, **limits, n_routed_experts=E, vocab_size=100, num_hidden_layers=1, mlp_layer_types=[kind]
    )
    ours = spec(scoring="sqrt_softplus", correction_bias=True, shared_intermediate_size=W, num_hash_layers=1, **limits)
    return DeepseekV4SparseMoeBlock(config, 0), ours, V4_NAMES, 100 if kind == "hash_moe" else 0


MODULES: dict[str, Callable[[], tuple[nn.Module, MoESpec, MoENames, int]]] = {
    "qwen3_moe": qwen3,
    "qwen3_next": qwen3_next,
    "deepseek_v3": deepseek_v3,
    "deepseek_v4": deepseek_v4,
    "deepseek_v4-hash": lambda: deepseek_v4("hash_moe"),
}
RENAMED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "e_score_correction_bias": "bias"}


def checkpoint_of(module: nn.Module, names: MoENames) -> dict[str, Tensor]:
    """The module's tensors, random, under checkpoint names: one tensor per expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(100, E).argsort(-1)[:, :K])
        else:
            tensor.normal_(0, 0.3)
        if name == "experts.gate_up_proj":
            for e, (gate, up) in enumerate(w.chunk(2) for w in tensor):
                found |= {f"experts.{e}.gate_proj.weight": gate, f"experts.{e}.up_proj.weight": up}
        elif name == "experts.down_proj":
            found |= {f"experts.{e}.down_proj.weight": w for e, w in enumerate(tensor)}
        else:
            found[name] = tensor
    if names is V4_NAMES:
        for old, new in RENAMED.items():
            found = {n.replace(old, new): t for n, t in found.items()}
    return found


def fill(layer: MoE, tensors: dict[str, Tensor], form: str = "one tensor per expert") -> None:
    """As the loader does; every tensor must find its place, and every place its tensor."""
    slots = [s for s in layer.slots() if s.form in ("", form)]
    assert {s.name for s in slots} == tensors.keys()
    for slot in slots:
        assert slot.shape == tensors[slot.name].shape
        slot.target.copy_(tensors[slot.name].narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))


@pytest.fixture(params=list(MODULES))
def layers(request: pytest.FixtureRequest) -> tuple[nn.Module, MoE, dict[str, Tensor]]:
    module, numbers, names, vocab = MODULES[request.param]()
    with torch.no_grad():
        tensors = checkpoint_of(module, names)
        ours = MoE(Build(torch.float32, CPU), D, numbers, names, hash_vocab=vocab)
        fill(ours, tensors)
    return module, ours, tensors


def run_theirs(module: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    if isinstance(module, DeepseekV4SparseMoeBlock):
        return module(x[None], tokens[None])[0]
    return module(x[None])[0]


@torch.no_grad()
def test_layer_equals_transformers(layers: tuple[nn.Module, MoE, dict[str, Tensor]]) -> None:
    module, ours, _ = layers
    for count in (1, 2, 9, 150):
        x, tokens = torch.randn(count, D), torch.randint(100, (count,))
        before = x.clone()
        got = ours(x, tokens)
        want = run_theirs(module, x, tokens)
        assert (got - want).abs().max() < 3e-6 * want.abs().max()
        assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(MODULES))
def test_a_token_has_the_same_bits_in_any_batch(kind: str, dtype: torch.dtype) -> None:
    module, numbers, names, vocab = MODULES[kind]()
    ours = MoE(Build(dtype, CPU), D, numbers, names, hash_vocab=vocab)
    fill(ours, checkpoint_of(module, names))
    x, tokens = torch.randn(120, D).to(dtype), torch.randint(100, (120,))
    whole = ours(x, tokens)
    assert whole.dtype == dtype
    before = torch.get_num_threads()
    for first, count, threads in ((0, 1, 1), (119, 1, 3), (50, 3, 2), (10, 64, 4), (0, 120, 3)):
        torch.set_num_threads(threads)
        part = slice(first, first + count)
        assert torch.equal(ours(x[part], tokens[part]), whole[part])
    torch.set_num_threads(before)


@torch.no_grad()
def test_ranks_together_equal_one(layers: tuple[nn.Module, MoE, dict[str, Tensor]], request: Any) -> None:
    """Each rank's partial sums, added up, are the whole."""
    _, ours, tensors = layers
    _, numbers, names, vocab = MODULES[request.node.callspec.params["layers"]]()
    x, tokens = torch.randn(20, D), torch.randint(100, (20,))
    total = torch.zeros(20, D)
    for rank in range(4):
        build = Build(torch.float32, CPU, TensorParallel(rank, 4, lambda partial: partial))
        part = MoE(build, D, numbers, names, hash_vocab=vocab)
        fill(part, tensors)
        assert part.experts.weights.gate_up_ELD.shape == (E, 2 * W // 4, D)
        total += part(x, tokens)
    whole = ours(x, tokens)
    assert (total - whole).abs().max() < 3e-6 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", ["fused", "fused and transposed"])
def test_fused_forms_fill_the_same_tensors(size: int, form: str) -> None:
    module, numbers, names, _ = qwen3()
    tensors = checkpoint_of(module, names)
    fused = {n: t for n, t in tensors.items() if not n.startswith("experts.")}
    fused |= {n: p.data for n, p in module.named_parameters() if n.startswith("experts.")}
    if form == "fused and transposed":
        fused |= {n: t.mT.contiguous() for n, t in fused.items() if n.startswith("experts.")}
    for rank in range(size):
        build = Build(torch.float32, CPU, TensorParallel(rank, size, lambda partial: partial))
        ours, other = (MoE(build, D, numbers, names) for _ in range(2))
        fill(ours, tensors)
        fill(other, fused, form)
        assert torch.equal(ours.experts.weights.gate_up_ELD, other.experts.weights.gate_up_ELD)
        assert torch.equal(ours.experts.weights.down_EDI, other.experts.weights.down_EDI)


def test_an_expert_without_tokens_is_not_touched() -> None:
    module, numbers, names, _ = qwen3()
    ours = MoE(Build(torch.float32, CPU), D, numbers, names)
    with torch.no_grad():
        fill(ours, checkpoint_of(module, names))
        x = torch.randn(1, D)
        want = ours(x)
        ids, _ = ours.gate(x, None)
        others = sorted(set(range(E)) - set(ids[0].tolist()))
        ours.experts.weights.gate_up_ELD[others] = float("nan")
        ours.experts.weights.down_EDI[others] = float("nan")
        assert torch.equal(ours(x), want)
        assert ours(torch.empty(0, D)).shape == (0, D)


def test_forms_are_chosen_by_layer() -> None:
    """`choose_forms` with nothing there offers the first form, once."""
    ours = MoE(Build(torch.float32, CPU), D, spec(), MoENames())
    slots, mixed = choose_forms(ours.slots("model.layers.0.mlp."), {})
    assert not mixed
    assert {s.form for s in slots if s.form} == {"one tensor per expert"}
    assert len(slots) == 1 + 3 * E
    assert {s.owner for s in slots if s.form} == {"model.layers.0.mlp.experts."}
