"""Drafts of multi-token-prediction layers beside recurrent states: their reference's rows also where a sequence goes
back, and no token changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import Pair, Solo, greedy, prompts, reference_tokens
from mtp_support import MTP, DraftWatch, make_qwen_mtp
from safetensors.torch import load_file, save_file
from test_mtp import check_drafts
from test_speculative import check, requests
from tiny_models import make_qwen3_5, make_qwen3_next

from common.errors import ConfigError
from common.models.spec import ModelSpec

MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3_next": make_qwen3_next,
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": partial(make_qwen3_5, moe=True),
}
TIGHT: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": 200_000, "max_num_seqs": 8}
COUNT = 12


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_mtp(tmp_path_factory.mktemp(request.param), 4, MAKERS[request.param])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_mtp(tmp_path_factory.mktemp("dense"), seed=4)


def often_right(folder: Path, given: Sequence[tuple[int, ...]], count: int, share: float) -> Callable[..., int | None]:
    """Draws the token that comes with probability `share`, the layer's own choice else."""
    texts = [(*p, *reference_tokens(folder, p, count)) for p in given]
    rng = random.Random(3)

    def known(before: Sequence[int]) -> int | None:
        own = next((t for t in texts if t[: len(before)] == tuple(before)), ())
        return own[len(before)] if len(before) < len(own) and rng.random() < share else None

    return known


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_every_draft_is_drawn_from_the_references_scores(model: Path, chunk: int, share: float) -> None:
    """Where drafts are wrong, each second step goes back and the next one brings the rows."""
    solo = Solo(model, speculative_config=MTP, max_num_batched_tokens=chunk)
    given = prompts(90, (1, 2, 16, 33, 50))
    watch = DraftWatch(solo.decode, known=often_right(model, given, COUNT, share))
    answers = [solo.submit(p, greedy(COUNT)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(model, prompt, COUNT)
    check_drafts(model, watch, 30)
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    wrong = speculator.num_draft_tokens - speculator.num_accepted_tokens
    assert wrong > 5
    assert (speculator.num_accepted_tokens > 5) == (share > 0)
    solo.check_idle()


def test_a_cached_prefix_goes_on_from_the_row_that_is_kept_with_it(model: Path) -> None:
    solo = Solo(model, speculative_config=MTP)
    watch = DraftWatch(solo.decode)
    shared, *ends = prompts(91, (48, 5, 20, 1))
    cached = []
    for end in ends:
        watch.drafts.clear()
        answer = solo.submit(shared + end, greedy(6))
        solo.run()
        assert answer.tokens[0] == reference_tokens(model, shared + end, 6)
        cached.append(answer.stats.cached_tokens)
        check_drafts(model, watch, 5)
    assert cached[0] == 0
    assert cached[2] == 48
    solo.check_idle()


def test_recomputed_sequences_have_the_same_rows(dense: Path) -> None:
    solo = Solo(dense, speculative_config=MTP, **TIGHT)
    given = prompts(92, (60, 50, 40, 30, 70))
    watch = DraftWatch(solo.decode, known=often_right(dense, given, 40, 0.5))
    answers = [solo.submit(p, greedy(40)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(dense, prompt, 40)
    assert sum(a.stats.preemptions for a in answers) > 0
    check_drafts(dense, watch, 40)
    solo.check_idle()


@pytest.mark.parametrize("block_sizes", [(16, 16), (48, 32)])
def test_a_hand_off_brings_the_rows_and_the_state(model: Path, block_sizes: tuple[int, int]) -> None:
    prefill = {"speculative_config": MTP, "max_num_batched_tokens": 20, "block_size": block_sizes[0]}
    pair = Pair(model, prefill=prefill, speculative_config=MTP, block_size=block_sizes[1])
    watch = DraftWatch(pair.decode)
    given = prompts(93, (1, 16, 33, 70))
    for prompt in (*given, given[3] + given[1]):
        answer = pair.submit(prompt, greedy(8))
        pair.run()
        assert answer.tokens[0] == reference_tokens(model, prompt, 8)
        assert (answer.stats.fallback, answer.stats.transferred_tokens) == ("", len(prompt))
    check_drafts(model, watch, 30)
    assert pair.decode.parts.reader.counters.cold == {}
    pair.check_idle()


def test_rows_that_waited_while_drafts_did_not_pay_are_made_later(dense: Path) -> None:
    solo = Solo(dense, speculative_config=MTP)
    watch = DraftWatch(solo.decode, always=False)
    given = prompts(98, (20, 33, 7))
    answers = [solo.submit(p, greedy(64)) for p in given]
    solo.run()
    for prompt, answer in zip(given, answers, strict=True):
        assert answer.tokens[0] == reference_tokens(dense, prompt, 64)
    check_drafts(dense, watch, 6)
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
    for _ in range(2):
        answers = [solo.submit(*one) for one in requests(model)]
        solo.run()
        check(model, answers)
    assert len(watch.drafts) > 200
    solo.check_idle()


def test_a_multimodal_checkpoint_has_the_layer_beside_its_towers(tmp_path: Path) -> None:
    donor = make_qwen_mtp(tmp_path / "donor", seed=5)
    folder = make_qwen3_5(tmp_path / "model", seed=5, vision=True)
    own = {n: t for n, t in load_file(donor / "model.safetensors").items() if n.startswith("mtp.")}
    save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors", {"format": "pt"})
    solo, plain = Solo(folder, speculative_config=MTP), Solo(folder)
    watch = DraftWatch(solo.decode)
    (prompt,) = prompts(97, (40,))
    got, wanted = solo.submit(prompt, greedy(COUNT)), plain.submit(prompt, greedy(COUNT))
    solo.run()
    plain.run()
    assert got.tokens == wanted.tokens
    assert len(watch.drafts) > 8


def test_the_layer_is_read_where_it_is_asked_for_and_whole(tmp_path: Path) -> None:
    folder = make_qwen_mtp(tmp_path, seed=4, make=MAKERS["qwen3_5_moe"])
    names = ["kv", "gdn_conv", "gdn_recurrent", "draft_kv", "draft_hidden", "last_hidden"]
    plain, drafts = Solo(folder), Solo(folder, speculative_config=MTP)
    assert plain.decode.parts.drafting is None
    assert [r.name for r in plain.decode.parts.layout.regions if r.name.startswith("draft")] == []
    assert [r.name for r in drafts.decode.parts.layout.regions] == names
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["mtp.pre_fc_norm_hidden.weight"]
    tensors["mtp.surprise.weight"] = torch.zeros(1)
    tensors["mtp.layers.1.input_layernorm.weight"] = torch.zeros(1)
    save_file(tensors, path, {"format": "pt"})
    Solo(folder)
    with pytest.raises(ConfigError, match=r"missing: mtp.pre_fc_norm_hidden.weight \[64\]; unknown: mtp.surprise") as e:
        Solo(folder, speculative_config=MTP)
    assert e.value.message.count(";") == 1


@pytest.mark.parametrize(
    ("fields", "weights", "count"),
    [
        ({}, True, 1),
        ({"mtp_num_hidden_layers": 2}, True, 2),
        ({"mtp_num_hidden_layers": 1}, False, 1),
        ({"num_nextn_predict_layers": 1}, False, 1),
        ({}, False, 0),
        ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True}, True, 0),
    ],
)
def test_how_many_layers_there_are(tmp_path: Path, fields: dict[str, Any], weights: bool, count: int) -> None:
    folder = make_qwen_mtp(tmp_path, 4, make_qwen3_next, **fields)
    spec = ModelSpec.from_folder(folder, weights=weights)
    assert spec.mtp_layers == count


def test_a_checkpoint_without_the_layer_is_refused(tmp_path: Path) -> None:
    folder = make_qwen3_5(tmp_path, mtp_num_hidden_layers=1)
    with pytest.raises(ConfigError, match="has no multi-token-prediction layer"):
        Solo(folder, speculative_config=MTP)
