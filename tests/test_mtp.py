"""Drafts of the model's own multi-token-prediction layer: its reference's rows in every mode, and no token changed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import Answer, Pair, Solo, greedy, prompts, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_support import ALWAYS, MTP, DraftWatch, make_mtp
from safetensors.torch import load_file, save_file
from speculative_support import check_mixture
from test_speculative import Outcome, check, expected, requests
from tiny_models import make_deepseek_v3, make_deepseek_v32, make_glm_moe_dsa

from common.engine.messages import EngineLoad, LabelledCounter
from common.errors import ConfigError
from common.types import SamplingParams
from nanodeploy import LLM

TOLERANCE = 1e-4
TRAINED = Path(__file__).parent / "data" / "mtp-dyck"
TIGHT: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": 110_000, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(tmp_path_factory.mktemp("mtp"), seed=4)


def check_drafts(folder: Path, watch: DraftWatch, least: int) -> None:
    assert len(watch.drafts) >= least
    assert max(draft.error(folder) for draft in watch.drafts) < TOLERANCE


@pytest.mark.parametrize("chunk", [2048, 7])
def test_every_draft_is_drawn_from_the_references_scores(model: Path, chunk: int) -> None:
    """Drafts are made of a prompt's end and of every step behind it, and chained."""
    solo = Solo(model, speculative_config=MTP, max_num_batched_tokens=chunk)
    watch = DraftWatch(solo.decode)
    given_ = prompts(90, (1, 2, 16, 33, 50))
    answers = [solo.submit(p, greedy(9)) for p in given_]
    solo.run()
    for prompt, answer in zip(given_, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(model, prompt, 9)
    check_drafts(model, watch, 40)
    assert {len(d.drafts) for d in watch.drafts} == {0, 1, 2}
    solo.check_idle()


@pytest.mark.parametrize("tight", [False, True])
def test_rows_that_waited_while_drafts_did_not_pay_are_made_later(model: Path, tight: bool) -> None:
    """Random layers are always wrong: trials come at longer and longer intervals, and blocks fill up in between."""
    solo = Solo(model, speculative_config=MTP, **(TIGHT if tight else {}))
    watch = DraftWatch(solo.decode, always=False)
    passes: list[int] = []
    runner = watch._runner
    run = runner.run
    runner.run = lambda hidden, work: passes.append(len(work.rows)) or run(hidden, work)  # type: ignore[method-assign]
    given_ = prompts(98, (20, 33, 7, 60)) if tight else prompts(98, (20, 33, 7))
    answers = [solo.submit(p, greedy(64)) for p in given_]
    solo.run()
    for prompt, answer in zip(given_, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(model, prompt, 64)
    check_drafts(model, watch, 10)
    assert sum(passes) < (1 + tight) * 20 * len(given_)
    assert (sum(a.stats.preemptions for a in answers) > 0) == tight
    turn = given_[0] + tuple(answers[0].tokens[0]) + given_[1][:5]
    watch.drafts.clear()
    follow = solo.submit(turn, greedy(4))
    solo.run()
    assert tight or follow.stats.cached_tokens == 80
    check_drafts(model, watch, 1)
    solo.check_idle()


def test_a_cached_prefix_goes_on_from_the_row_that_is_kept_with_it(model: Path) -> None:
    """Whatever followed the prefix before: its last row knows nothing of that."""
    solo = Solo(model, speculative_config=MTP)
    watch = DraftWatch(solo.decode)
    shared, *ends = prompts(91, (48, 5, 20, 1))
    for end in ends:
        watch.drafts.clear()
        answer = solo.submit(shared + end, greedy(6))
        solo.run()
        assert answer.stats.cached_tokens == (48 if end is not ends[0] else 0)
        check_drafts(model, watch, 8)
    solo.check_idle()


def test_recomputed_sequences_have_the_same_rows(model: Path) -> None:
    solo = Solo(model, speculative_config=MTP, **TIGHT)
    watch = DraftWatch(solo.decode)
    given_ = prompts(92, (60, 50, 40, 30, 70))
    answers = [solo.submit(p, greedy(40)) for p in given_]
    solo.run()
    assert sum(a.stats.preemptions for a in answers) > 0
    check_drafts(model, watch, 60)
    solo.check_idle()


@pytest.mark.parametrize("block_sizes", [(16, 16), (48, 32)])
def test_a_hand_off_brings_the_rows_and_the_first_token_adds_its_own(model: Path, block_sizes: tuple[int, int]) -> None:
    prefill = {"speculative_config": MTP, "max_num_batched_tokens": 20, "block_size": block_sizes[0]}
    pair = Pair(model, prefill=prefill, speculative_config=MTP, block_size=block_sizes[1])
    watch = DraftWatch(pair.decode)
    given_ = prompts(93, (1, 16, 33, 70))
    for prompt in (*given_, given_[3] + given_[1]):
        answer = pair.submit(prompt, greedy(6))
        pair.run()
        assert answer.tokens[0] == reference_tokens(model, prompt, 6)
        assert (answer.stats.fallback, answer.stats.computed_tokens) == ("", 0)
    check_drafts(model, watch, 40)
    assert pair.decode.parts.reader.counters.cold == {}
    pair.check_idle()


def test_a_failed_hand_off_goes_on_from_what_was_verified(model: Path) -> None:
    pair = Pair(model, prefill={"speculative_config": MTP, "max_num_batched_tokens": 16}, speculative_config=MTP)
    watch = DraftWatch(pair.decode)
    (prompt,) = prompts(94, (100,))
    answer = pair.submit(prompt, greedy(6))
    for _ in range(5):
        pair.step()
    pair.kill_prefill()
    pair.run()
    assert answer.tokens[0] == reference_tokens(model, prompt, 6)
    assert answer.stats.fallback
    check_drafts(model, watch, 8)


@pytest.mark.parametrize("who", ["decode", "prefill"])
def test_a_peer_without_the_layer_means_a_cold_draft_and_the_same_tokens(model: Path, who: str) -> None:
    has = {"speculative_config": MTP}
    pair = Pair(model, prefill=has if who == "prefill" else {}, **(has if who == "decode" else {}))
    loads: list[EngineLoad] = []
    take = pair.on_decode
    pair.on_decode = lambda m: loads.append(m) if isinstance(m, EngineLoad) else take(m)  # type: ignore[method-assign]
    (prompt,) = prompts(95, (40,))
    answer = pair.submit(prompt, greedy(10))
    pair.run()
    pair.clock.advance(2.0)  # type: ignore[attr-defined]
    pair.step()
    assert answer.tokens[0] == reference_tokens(model, prompt, 10)
    assert (answer.stats.transferred_tokens, answer.stats.fallback) == (40, "")
    cold = LabelledCounter("handoff_cold_regions_total", "region", (("draft_mla_latent", 1.0), ("draft_hidden", 1.0)))
    assert (cold in loads[-1].labelled) == (who == "decode")
    assert (answer.stats.drafts > 0) == (who == "decode")
    pair.check_idle()


@pytest.mark.parametrize("value", [float("nan"), 1e30, 0.0])
def test_whatever_the_layers_cache_holds_no_token_changes(model: Path, value: float) -> None:
    solo = Solo(model, speculative_config=MTP)
    watch = DraftWatch(solo.decode)
    (prompt,) = prompts(96, (40,))
    answer = solo.submit(prompt, greedy(20))
    pool = solo.decode.parts.runner._pool
    while not answer.ended:
        for region in ("draft_mla_latent", "draft_hidden"):
            pool.region(region).fill_(value)
        solo.step()
    assert answer.tokens[0] == reference_tokens(model, prompt, 20)
    assert watch.drafts
    solo.check_idle()


@pytest.mark.parametrize("mode", ["plain", "chunked", "tight", "handed over"])
def test_answers_are_those_without_speculation(model: Path, mode: str) -> None:
    """Greedy and sampled, with penalties, stops and choices; see `test_speculative`."""
    options: dict[str, Any] = {"plain": {}, "chunked": {"max_num_batched_tokens": 7}, "tight": TIGHT}.get(mode, {})
    if mode == "handed over":
        solo: Solo = Pair(model, prefill={"speculative_config": MTP}, speculative_config=MTP)
    else:
        solo = Solo(model, speculative_config=MTP, **options)
    watch = DraftWatch(solo.decode)
    first = [solo.submit(*one) for one in requests(model)]
    solo.run()
    again = [solo.submit(*one) for one in requests(model)]
    solo.run()
    check(model, first)
    check(model, again)
    assert len(watch.drafts) > 300
    solo.check_idle()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_any_mixture_of_requests_and_events(model: Path, seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"max_num_batched_tokens": rng.choice((5, 13, 64, 2048))}
    if rng.random() < 0.5:
        options |= TIGHT | {"max_num_seqs": rng.choice((3, 8))}
    solo = Solo(model, speculative_config=MTP | {"num_speculative_tokens": rng.randint(1, 4)}, **options)
    if rng.random() < 0.7:
        speculator = solo.decode.parts.speculator
        assert speculator is not None
        speculator._cost = ALWAYS
    asked = list(zip(requests(model), expected(model), strict=True))
    running: list[tuple[Answer, Outcome]] = []
    cancelled: set[int] = set()
    for _ in range(rng.randint(5, 20)):
        (prompt, params), wanted = rng.choice(asked)
        running.append((solo.submit(prompt, params), wanted))
        for _ in range(rng.randint(0, 6)):
            solo.step()
        if rng.random() < 0.2:
            index = rng.randrange(len(running))
            solo.cancel(running[index][0])
            cancelled.add(index)
    solo.run()
    check_mixture(running, cancelled)
    solo.check_idle()


@pytest.mark.parametrize("make", [make_deepseek_v32, make_glm_moe_dsa], ids=["deepseek_v32", "glm_moe_dsa"])
def test_models_with_sparse_attention_draft_with_a_dense_layer(tmp_path: Path, make: Any) -> None:
    """The layer's own indexer is left; the tokens are those of the model, sparse as it is."""
    sizes = {"v_head_dim": 28} if make is make_glm_moe_dsa else {}
    donor = make_mtp(tmp_path / "donor", seed=5, **sizes)
    folder = make(tmp_path / "model", seed=5)
    prefix = "model.layers.3."
    own = {n: t for n, t in load_file(donor / "model.safetensors").items() if n.startswith(prefix)}
    own[f"{prefix}self_attn.indexer.wk.weight"] = torch.zeros(3, 3)
    save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"num_nextn_predict_layers": 1,', 1))
    solo = Solo(folder, speculative_config=MTP)
    watch = DraftWatch(solo.decode)
    plain = Solo(folder)
    given_ = prompts(97, (20, 60))
    got, wanted = ([s.submit(p, greedy(12)) for p in given_] for s in (solo, plain))
    solo.run()
    plain.run()
    assert [a.tokens for a in got] == [a.tokens for a in wanted]
    assert len(watch.drafts) > 30


def test_the_trained_model_is_right_about_most_drafts() -> None:
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 26, "num_threads": 1}
    prompt = [1, *range(5, 12)]
    asked = [SamplingParams(temperature=t, seed=3, max_tokens=200, ignore_eos=True) for t in (0.0, 1.0)]
    with LLM(TRAINED, **options) as llm:
        wanted = llm.generate([prompt] * 2, asked)
    with LLM(TRAINED, **options, speculative_config=MTP) as llm:
        got = llm.generate([prompt] * 2, asked)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
    shares = [o.stats.accepted_draft_tokens / o.stats.draft_tokens for o in got]
    assert shares[0] > 0.7
    assert shares[1] > 0.5, "the noise of a draft is its token's"


def test_without_the_method_the_layer_is_left_unread(model: Path) -> None:
    solo = Solo(model)
    assert solo.decode.parts.drafting is None
    assert [r.name for r in solo.decode.parts.layout.regions] == ["mla_latent", "last_hidden"]


def test_a_checkpoint_without_the_layer_is_refused_and_one_with_half_of_it_too(tmp_path: Path, model: Path) -> None:
    without = make_deepseek_v3(tmp_path / "without", num_nextn_predict_layers=1)
    with pytest.raises(ConfigError, match="has no multi-token-prediction layer"):
        Solo(without, speculative_config=MTP)
    half = tmp_path / "half"
    half.mkdir()
    for path in model.iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    tensors = load_file(half / "model.safetensors")
    del tensors["model.layers.3.hnorm.weight"]
    tensors["model.layers.3.surprise.weight"] = torch.zeros(1)
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing: model.layers.3.hnorm.weight \[64\]; unknown: .*surprise"):
        Solo(half, speculative_config=MTP)
