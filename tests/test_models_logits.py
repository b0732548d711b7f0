"""Our models against transformers: fp32 logits at every position, however the work is cut into steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import FAMILIES
from models_support import PagedModel
from tiny_models import VOCAB_SIZE
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-4
QUICK = [(family, configuration) for family in FAMILIES for configuration in family.quick_configurations]


class Checkpoint(NamedTuple):
    folder: Path
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=QUICK, ids=lambda c: f"{c[0].name}-{c[1]}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family, configuration = request.param
    folder = family.configurations[configuration](tmp_path_factory.mktemp("checkpoint"))
    return Checkpoint(folder, family.reference(folder))


def fresh_prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def oracle(checkpoint: Checkpoint, tokens: list[int]) -> Tensor:
    logits: Tensor = checkpoint.reference(torch.tensor([tokens])).logits[0]
    return logits


def check(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_whole_prompt(checkpoint: Checkpoint) -> None:
    tokens = fresh_prompt(77)
    (logits,) = PagedModel(checkpoint.folder).step([(0, tokens)])
    check(logits, oracle(checkpoint, tokens))


def test_chunks_then_single_tokens(checkpoint: Checkpoint) -> None:
    tokens = fresh_prompt(90)
    paged = PagedModel(checkpoint.folder, seed=1)
    cuts = [*range(0, 70, 7), *range(70, 91)]
    parts = [paged.step([(0, tokens[a:b])])[0] for a, b in itertools.pairwise(cuts)]
    check(torch.cat(parts), oracle(checkpoint, tokens))


def test_mixed_batches(checkpoint: Checkpoint) -> None:
    """Prompts, chunks and decode rows of unequal lengths in the same steps."""
    prompts = {s: fresh_prompt(n) for s, n in enumerate((100, 3, 41, 64, 17, 33))}
    done = dict.fromkeys(prompts, 0)
    got: dict[int, list[Tensor]] = {s: [] for s in prompts}
    paged = PagedModel(checkpoint.folder, seed=2)
    widths = (1, 7, 1, 40, 1, 2, 1, 1)
    turn = 0
    while any(done[s] < len(p) for s, p in prompts.items()):
        work = []
        for s, p in prompts.items():
            n = widths[(turn + s) % len(widths)]
            if done[s] < len(p) and (turn + s) % 4:
                work.append((s, p[done[s] : done[s] + n]))
        for (s, tokens), logits in zip(work, paged.step(work) if work else [], strict=True):
            got[s].append(logits)
            done[s] += len(tokens)
        turn += 1
    for s, p in prompts.items():
        check(torch.cat(got[s]), oracle(checkpoint, p))
