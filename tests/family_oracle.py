"""What transformers in fp32 answers to a prompt: greedy tokens, and logits at every position of prompt and answer.

Tokens come from its own cached generation, one prompt at a time and never padded (several families pad wrongly). Logits
come from one pass over prompt and answer without a cache. The two are independent, so `disagreement` says how exact
the reference itself is: an error of ours below that says nothing.

Answers are kept in a folder (pytest's cache) under a hash of the checkpoint's files, the prompt and the versions of
torch and transformers: only the first run pays for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from teacher_forced import generate_greedily
from torch import Tensor
from transformers import PreTrainedModel

NEAR_TIE = 1e-4  # logits
_SCHEMA = 1


@dataclass(frozen=True)
class Expected:
    """`logits_PV`: row p is what follows position p of prompt and answer; the answer's last token has none."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logits_PV: Tensor
    disagreement: float

    @cached_property
    def gaps(self) -> list[float]:
        """How far in logits each token is ahead of the second best."""
        best = self.logits_PV[len(self.prompt) - 1 :].topk(2).values
        return (best[:, 0] - best[:, 1]).tolist()

    @property
    def near_ties(self) -> int:
        return sum(gap < NEAR_TIE for gap in self.gaps)


class FamilyOracle:
    """The reference for one checkpoint; loaded when an answer is not in `cache` yet."""

    def __init__(self, folder: Path, load: Callable[[Path], PreTrainedModel], cache: Path) -> None:
        self._folder = folder
        self._load = load
        self._cache = cache

    def answer(self, prompt: Sequence[int], count: int) -> Expected:
        """`count` greedy tokens after `prompt`, past any end of text."""
        key = [_SCHEMA, torch.__version__, transformers.__version__, self._contents, list(prompt), count]
        path = self._cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
        if not path.is_file():
            part = path.with_suffix(".part")
            save_file(self._compute(prompt, count), part)
            part.replace(path)
        kept = load_file(path)
        return Expected(tuple(prompt), kept["tokens"].tolist(), kept["logits"], float(kept["disagreement"]))

    @cached_property
    def _contents(self) -> str:
        digest = hashlib.sha256()
        for path in sorted([self._folder / "config.json", *self._folder.glob("*.safetensors")]):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @cached_property
    def _model(self) -> Any:
        return self._load(self._folder)

    @torch.inference_mode()
    def _compute(self, prompt: Sequence[int], count: int) -> dict[str, Tensor]:
        out = generate_greedily(self._model, prompt, count)
        logits = self._model(out.sequences[:, :-1]).logits[0].float()
        generated = torch.cat(out.logits).float()
        return {
            "tokens": out.sequences[0, len(prompt) :].contiguous(),
            "logits": logits.contiguous(),
            "disagreement": (logits[len(prompt) - 1 :] - generated).abs().max(),
        }
