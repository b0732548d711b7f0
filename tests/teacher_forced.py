"""Transformers in fp32 as the judge: greedy tokens to equal, or scores of tokens that another run produced.

In fp32 every way through NanoDeploy gives exactly the greedy tokens (`Oracle.greedy`). In bf16 it may not: one
rounding decides between two tokens whose scores are nearly equal, and all tokens after it are others. So tokens
made in bf16 are judged one by one (`Oracle.score`): the reference reads prompt and answer once, in fp32 over the
same bf16 weights, and each token's logit is compared with the best at its place, given what was really sent before.

Measured with SmolLM2 on 1,200 tokens of 50 prompts (AVX2): a bf16 logprob is off by 0.046 (standard deviation), at the
99th percentile by 0.18, at most by 0.39; 1.7 % of the tokens are not the reference's own, none of them is more than
0.075 behind. So a token up to `EQUAL` behind counts as equal, at most `MAX_NEAR_TIES` of the tokens may be further
behind, and none by more than `LIMIT`. A token chosen wrongly is typically behind by more than 1.

Answers are computed, never typed in. They are kept in a folder (pytest's cache) under a hash of the weights, the
tokens and the versions of torch and transformers, so that only the first run pays for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from common.models.spec import ModelSpec

EQUAL = 0.1  # logits
LIMIT = 0.5  # logits
MAX_NEAR_TIES = 0.01


@torch.inference_mode()
def generate_greedily(model: Any, prompt: Sequence[int], count: int) -> Any:
    """Exactly `count` tokens by transformers' cached generation: `sequences` [1, all], `logits` count x [1, vocab]."""
    ids = torch.tensor([list(prompt)])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens, and how far in logits each was ahead of the second best."""

    tokens: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Judgement:
    """How far in reference logits each token of an answer is behind the best: 0 where it is the best."""

    behind: list[float]

    @property
    def others(self) -> int:
        """Tokens that are not the reference's own choice."""
        return sum(gap > 0 for gap in self.behind)

    @property
    def near_ties(self) -> int:
        """Tokens that are further behind than rounding explains in most cases."""
        return sum(gap > EQUAL for gap in self.behind)

    @property
    def passed(self) -> bool:
        return max(self.behind) <= LIMIT and self.near_ties <= MAX_NEAR_TIES * len(self.behind)

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(self.behind + other.behind)


class Oracle:
    """The model of `folder` in transformers, loaded when an answer is not in `cache` yet."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self._cache = cache
        self._weights = ModelSpec.from_folder(str(folder)).model_hash

    def greedy(self, prompt: Sequence[int], count: int) -> Greedy:
        """`count` tokens after `prompt`, past any end of text."""
        return Greedy(**self._remember("greedy", [list(prompt), count], lambda: asdict(self._greedy(prompt, count))))

    def score(self, prompt: Sequence[int], tokens: Sequence[int]) -> Judgement:
        """Judge `tokens`, each given `prompt` and the tokens before it."""
        key = [list(prompt), list(tokens)]
        return Judgement(**self._remember("score", key, lambda: asdict(self._score(prompt, tokens))))

    def _remember(self, kind: str, key: list[Any], compute: Any) -> dict[str, Any]:
        versions = [torch.__version__, transformers.__version__, self._weights.hex()]
        path = self._cache / f"{hashlib.sha256(json.dumps([kind, versions, key]).encode()).hexdigest()[:32]}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        answer: dict[str, Any] = compute()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(answer))
        part.replace(path)
        return answer

    @cached_property
    def _model(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval()

    def _greedy(self, prompt: Sequence[int], count: int) -> Greedy:
        out = generate_greedily(self._model, prompt, count)
        best = [logits[0].topk(2).values.tolist() for logits in out.logits]
        return Greedy(out.sequences[0, len(prompt) :].tolist(), [first - second for first, second in best])

    def _score(self, prompt: Sequence[int], tokens: Sequence[int]) -> Judgement:
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.inference_mode():
            logits = self._model(ids, logits_to_keep=len(tokens)).logits[0]
        own = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        return Judgement((logits.amax(1) - own).tolist())
