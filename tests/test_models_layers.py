"""Layers against plain formulas and transformers' own rotary tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from common.layers.base import Build, TensorParallel
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.mlp import SwiGLU
from common.layers.residual import ResidualStream
from common.layers.rms_norm import QKNorm, RMSNorm
from common.layers.rope import Rope, apply_rope, rope_table
from common.layers.rope_spec import RopeSpec

CPU = torch.device("cpu")
BUILD = Build(torch.float32, CPU)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
VARIANTS: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_type": "default"}, RopeSpec()),
    ({"rope_type": "default", "rope_theta": 1e6}, RopeSpec(theta=1e6)),
    ({"rope_type": "linear", "factor": 3.0}, RopeSpec("linear", factor=3.0)),
    (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        RopeSpec("llama3", 5e5, 32.0, 256, 1.0, 4.0),
    ),
    (YARN, RopeSpec("yarn", 1e4, 4.0, 512, attention_factor=1.138629436111989)),
    (
        YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False},
        RopeSpec("yarn", 1e4, 4.0, 512, beta_fast=20.0, beta_slow=2.0, attention_factor=0.7, truncate=False),
    ),
]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("parameters", "spec"), VARIANTS, ids=lambda v: getattr(v, "rope_type", None))
def test_rope_equals_transformers(parameters: dict[str, Any], spec: RopeSpec, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0} | parameters,
    )
    positions = torch.tensor([0, 1, 7, 300, 2047, 13])
    q, k = torch.randn(1, 2, 6, head_dim), torch.randn(1, 1, 6, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    want_q, want_k = apply_rotary_pos_emb(q, k, cos, sin)
    rope = Rope(BUILD, spec, head_dim, 2048)
    packed = torch.cat((q, k, k), 1)[0].transpose(0, 1).contiguous()
    turned = apply_rope(packed[:, :3], *rope(positions))
    assert turned.is_contiguous()
    want = torch.cat((want_q, want_k), 1)[0].transpose(0, 1)
    assert (turned - want).abs().max() < 2e-6


def test_rope_table_keeps_lengths_and_distances() -> None:
    table = rope_table(RopeSpec(), 32, 100)
    assert table.shape == (100, 2, 32)
    x, y = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def turned(v: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(v, table[position, 0], table[position, 1])

    assert torch.allclose(turned(x, 60).norm(), x.norm(), atol=1e-5)
    near, far = (turned(x, 5 + d) * turned(y, 2 + d) for d in (0, 70))
    assert torch.allclose(near.sum(), far.sum(), atol=1e-4)


def test_norms() -> None:
    x = torch.randn(5, 7, 16)
    norm = RMSNorm(BUILD, 16, 1e-3)
    norm.weight.normal_()
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(norm(x), want * norm.weight, atol=1e-6)
    both = QKNorm(BUILD, 5, 2, 16, 1e-3)
    both.weight_2D.normal_()
    got = both(x)
    assert torch.allclose(got[:, :5], want[:, :5] * both.weight_2D[0], atol=1e-6)
    assert torch.allclose(got[:, 5:], want[:, 5:] * both.weight_2D[1], atol=1e-6)


def test_swiglu() -> None:
    mlp = SwiGLU(BUILD, 8, 12, bias=True)
    parts = {s.name: s.target.normal_() for s in mlp.slots()}
    assert sorted(parts) == [f"{n}_proj.{k}" for n in ("down", "gate", "up") for k in ("bias", "weight")]
    x = torch.randn(4, 8)
    gate, up = (functional.linear(x, parts[f"{n}_proj.weight"], parts[f"{n}_proj.bias"]) for n in ("gate", "up"))
    want = functional.linear(functional.silu(gate) * up, parts["down_proj.weight"], parts["down_proj.bias"])
    assert torch.allclose(mlp(x), want, atol=1e-5)


def test_slices_of_all_ranks_make_the_whole() -> None:
    whole = torch.arange(24 * 8, dtype=torch.float32).view(24, 8)
    for size in (1, 2, 4):
        columns, rows = [], []
        for rank in range(size):
            build = Build(torch.float32, CPU, TensorParallel(rank, size, lambda x: x))
            column = ColumnLinear(build, 8, {"a": (4, 2), "b": (8, 2)}, bias=True)
            for slot in column.slots():
                if slot.name == "b.weight":
                    columns.append(whole[:16].narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
            (row,) = RowLinear(build, 4, 2, 24, bias=False).slots()
            rows.append(whole.narrow(row.dim, row.start, row.target.shape[row.dim]))
        assert torch.equal(torch.cat(columns), whole[:16])
        assert torch.equal(torch.cat(rows, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_stream_adds_late_and_gives_the_bits_of_adding_at_once(dtype: torch.dtype) -> None:
    norm = RMSNorm(Build(dtype, CPU), 24, 1e-6)
    norm.weight.normal_()
    rows, *deltas = torch.randn(5, 7, 24).to(dtype).unbind()
    wanted = rows.clone()
    stream = ResidualStream(rows)
    assert torch.equal(stream.normed(norm), norm(wanted))
    for delta in deltas[:2]:
        stream.add(delta)
        wanted += delta
        assert torch.equal(stream.normed(norm), norm(wanted))
        assert torch.equal(stream.normed(norm), norm(wanted))
    for delta in deltas[2:]:
        stream.add(delta)
        wanted += delta
    assert stream.rows is rows
    assert torch.equal(rows, wanted)
