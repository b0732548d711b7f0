"""A layer of latent attention by the kernels of GPUs in Triton's interpreter, against the CPU's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_mla_layer import HIDDEN, INDEXER, Paged, make
from torch import Tensor

from common.attention.cpu import CpuBackend
from common.attention.latent import Part
from common.attention.latent_gpu import LatentBackend
from common.kernels import gpu
from common.layers import mla as mla_module
from common.layers.mla_spec import IndexerSpec

pytestmark = pytest.mark.gpu


class PlainRagged:
    """`RaggedAttention` by its formula."""

    def able(self, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
        return True

    def attend(self, q_NGD: Tensor, k_PGD: Tensor, v_PGV: Tensor, part: Part, scale: float, out_NGV: Tensor) -> None:
        lined_up = part.ragged
        starts, keys = lined_up.query_starts_S1.tolist(), lined_up.key_starts_S1.tolist()
        for s, count in enumerate(part.ctx.query_starts_S1.diff().tolist()):
            for i in range(count):
                seen = slice(keys[s], keys[s + 1] - count + i + 1)
                scores = torch.einsum("hd,lhd->hl", q_NGD[starts[s] + i], k_PGD[seen]) * scale
                out_NGV[starts[s] + i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v_PGV[seen])


class RaggedLatent(LatentBackend):
    def __init__(self) -> None:
        super().__init__()
        self.ragged = PlainRagged()


ROUNDS = [
    [(0, 30), (1, 3), (2, 5)],
    [(0, 1), (1, 1), (2, 1)],
    [(0, 2), (1, 32), (2, 1)],
    [(0, 11), (1, 1), (2, 2)],
]


@pytest.mark.parametrize("backend", [LatentBackend, RaggedLatent])
@pytest.mark.parametrize("indexer", [None, INDEXER], ids=["dense", "sparse"])
def test_layers_by_the_interpreter(
    kernel_device: torch.device, monkeypatch: Any, indexer: IndexerSpec | None, backend: type[LatentBackend]
) -> None:
    """Prompts, chunks behind them, and decode steps alone and beside them, absorbed, expanded and sparse."""
    if kernel_device.type == "cuda":
        pytest.skip("a GPU computes whole layers in test_attention_latent_gpu")
    monkeypatch.setattr(mla_module, "MAX_ABSORBED", 4)
    layer, _ = make(indexer=indexer)
    xs = [torch.randn(n, HIDDEN) for n in (44, 37, 9)]
    results = []
    for used, on in ((CpuBackend(), False), (backend(), True)):
        monkeypatch.setattr(gpu, "enabled", lambda _, on=on: on)
        paged, done, out = Paged(layer, used, [len(x) for x in xs]), [0, 0, 0], []
        with torch.inference_mode():
            for work in ROUNDS:
                out += paged.step([(s, xs[s][done[s] : done[s] + n]) for s, n in work])
                for s, n in work:
                    done[s] += n
        results.append(torch.cat(out))
    off = (results[0] - results[1]).norm(dim=1) / results[0].norm(dim=1)
    assert off.max().item() < 1e-5
