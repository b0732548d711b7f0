"""Hand-offs whose ends are computed in halves: small prompts are long ones where little keeps the device busy."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_support import Answer, Pair, Solo, greedy, hybrid, llama, prompts, windowed
from mtp_support import MTP, make_mtp
from tiny_models import make_deepseek_v4, make_qwen3_next

from common.engine.scheduler import StepPlan
from common.types import SamplingParams

__all__ = ["hybrid", "llama", "windowed"]

BUSY = 10
LONGEST = 192
KINDS: list[dict[str, Any]] = [{}, {"temperature": 0.9}, {"n": 3, "temperature": 1.0}, {"prompt_logprobs": 1}]
PREFILL = {"max_num_seqs": 3, "async_scheduling": "on", "max_model_len": LONGEST}
DECODE = {"max_num_seqs": 5, "max_num_batched_tokens": 24, "max_model_len": LONGEST}


@pytest.fixture(autouse=True)
def little_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engine.build.busy_tokens", lambda spec: BUSY)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
    folder = tmp_path_factory.mktemp("compressed")
    return make_deepseek_v4(folder, seed=6, kinds="chc", sliding_window=24, compress_rates=rates, index_topk=4)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_next(tmp_path_factory.mktemp("recurrent"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(tmp_path_factory.mktemp("drafting"), seed=4)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windowed": {},
    "hybrid": {"state_snapshot_interval": 64},
    "recurrent": {},
    "compressed": {},
    "drafting": {"speculative_config": MTP},
}


@pytest.mark.parametrize(
    ("length", "budget", "ends"),
    [
        (20, 512, [20]),
        (21, 512, [11, 21]),
        (40, 512, [20, 40]),
        (100, 512, [50, 75, 88, 100]),
        (100, 64, [64, 82, 100]),
    ],
)
def test_the_end_of_a_prompt_is_computed_in_halves(llama: Path, length: int, budget: int, ends: list[int]) -> None:
    pair = Pair(llama, prefill={"max_num_batched_tokens": budget, "max_model_len": LONGEST})
    launch, computed = pair.prefill.engine._launch, []

    def noted(plan: StepPlan) -> Any:
        computed.append([item.start + item.num_new for item in plan.items])
        return launch(plan)

    pair.prefill.engine._launch = noted  # type: ignore[method-assign]
    (prompt,) = prompts(length, (length,))
    answer = pair.submit(prompt, greedy(4))
    pair.run(answer)
    assert computed == [[end] for end in ends]
    assert (answer.stats.fallback, answer.stats.transferred_tokens) == ("", length)
    pair.check_idle()


def asked(rng: random.Random) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Long and short ones; many begin alike."""
    texts = prompts(rng.randrange(2**32), [rng.choice((1, 16, 33, 64, 65, 130, 170)) for _ in range(14)])
    texts = [texts[0][: rng.choice((48, 60))] + text[:100] if i % 3 == 1 else text for i, text in enumerate(texts)]
    return [(text, greedy(rng.randrange(1, 16), seed=i, **rng.choice(KINDS))) for i, text in enumerate(texts)]


def drive(pair: Pair, left: list[tuple[tuple[int, ...], SamplingParams]], rng: random.Random) -> list[Answer]:
    """Requests and bytes come when they will; in some runs the prefill worker or its session is lost on the way."""
    answers: list[Answer] = []
    loss: Callable[[], None] | None = rng.choice((None, pair.kill_prefill, pair.lose_session))
    at = rng.randrange(5, 60)
    for step in range(10_000):
        if left and rng.random() < 0.4:
            answers.append(pair.submit(*left.pop(0), priority=rng.choice((0, 0, -1, 3))))
        if loss is not None and step == at:
            loss()
        pair.network.held = rng.random() < 0.7
        pair.network.step(rng.randrange(8))
        pair.step()
        if not left and all(a.ended for a in answers):
            return answers
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model", list(MODELS))
def test_answers_are_those_of_one_plain_engine(model: str, seed: int, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    options = MODELS[model]
    rng = random.Random(f"{model} {seed}")
    left = asked(rng)
    plain = Solo(folder, enable_prefix_caching=False)
    expected = [plain.submit(*one) for one in left]
    plain.run()
    prefill = PREFILL | options | {"max_num_batched_tokens": rng.choice((16, 40, 160))}
    pair = Pair(folder, prefill=prefill, **DECODE, **options)
    answers = drive(pair, list(left), rng)
    for (prompt, _), right, answer in zip(left, expected, answers, strict=True):
        assert answer.failure is None
        assert (answer.tokens, answer.finish) == (right.tokens, right.finish)
        assert (answer.prompt_logprobs is None) == (right.prompt_logprobs is None)
        s = answer.stats
        assert s.cached_tokens + s.computed_tokens + s.transferred_tokens == s.prompt_tokens == len(prompt)
    assert any(answer.stats.transferred_tokens for answer in answers)
    pair.network.held = False
    pair.network.advance()
    pair.step()
    pair.clock.advance(60.0)  # leases of what was lost run out by themselves
    pair.check_idle()
