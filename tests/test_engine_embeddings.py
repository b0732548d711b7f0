"""Vectors of an embedding checkpoint by the engine: transformers' numbers, however a prompt is computed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from embedding_support import TOLERANCE, cut, reference_vector
from engine_support import Answer, Pair, Solo, greedy, prompts
from numpy.typing import NDArray

from common.engine.messages import Drain
from common.errors import ConfigError, InvalidRequestError
from common.types import FinishReason, Pooling, SamplingParams
from nanodeploy import LLM

NOTHING_DRAWN = SamplingParams(max_tokens=1, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_qwen3_embedding(tmp_path_factory.mktemp("embedding"), seed=3)


@pytest.fixture(scope="module")
def solo(folder: Path) -> Solo:
    return Solo(folder, max_model_len=128, max_num_seqs=8)


def embed(solo: Solo, prompt: Any, dimensions: int = 0, **request: Any) -> Answer:
    return solo.submit(prompt, NOTHING_DRAWN, pooling=Pooling(dimensions), **request)


def vector(answer: Answer) -> NDArray[np.float32]:
    assert answer.finish == {0: FinishReason.STOP}, answer.failure
    assert answer.tokens == {0: []}
    return np.frombuffer(answer.vector, "<f4")


def test_a_batch_of_several_lengths_gives_the_last_hidden_states(solo: Solo, folder: Path) -> None:
    texts = prompts(1, (1, 2, 15, 16, 17, 64, 127, 128))
    answers = [embed(solo, text) for text in texts]
    solo.run()
    for text, answer in zip(texts, answers, strict=True):
        assert np.abs(vector(answer) - reference_vector(folder, text)).max() < TOLERANCE
        assert np.linalg.norm(vector(answer)) == pytest.approx(1, abs=1e-6)
        stats = answer.stats
        assert stats.prompt_tokens == len(text) == stats.cached_tokens + stats.computed_tokens
    solo.check_idle()


def test_chunks_and_a_prefix_cache_do_not_change_it(folder: Path) -> None:
    solo = Solo(folder, max_num_batched_tokens=24, max_model_len=256)
    (text, tail) = prompts(2, (200, 9))
    first = embed(solo, text)
    solo.run()
    again, longer = embed(solo, text), embed(solo, [*text[:160], *tail])
    solo.run()
    assert first.stats.cached_tokens == 0
    assert again.stats.cached_tokens == 192, "all whole blocks; the last token is computed in any case"
    assert longer.stats.cached_tokens == 160
    for answer, ids in ((first, text), (again, text), (longer, [*text[:160], *tail])):
        assert np.abs(vector(answer) - reference_vector(folder, ids)).max() < TOLERANCE
    solo.check_idle()


def test_dimensions_cut_and_scale_again(solo: Solo, folder: Path) -> None:
    (text,) = prompts(3, (40,))
    short, whole = embed(solo, text, 16), embed(solo, text, 64)
    solo.run()
    expected = reference_vector(folder, text)
    assert np.abs(vector(short) - cut(expected, 16)).max() < TOLERANCE
    assert np.abs(vector(whole) - expected).max() < TOLERANCE
    too_many = embed(solo, text, 65)
    assert_refused(solo, too_many, "dimensions")


def assert_refused(solo: Solo, answer: Answer, param: str) -> None:
    solo.run(answer)
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) in {("invalid_request", param), ("unsupported", param)}


def test_what_is_refused(solo: Solo) -> None:
    (text, long) = prompts(4, (20, 129))
    assert_refused(solo, embed(solo, long), "input")
    assert_refused(solo, solo.submit(text, greedy(3)), "model")
    assert_refused(solo, solo.submit(text, greedy(3, n=2), pooling=Pooling()), "pooling")
    assert_refused(solo, embed(solo, [*text, tiny_models.VOCAB_SIZE]), "prompt")
    solo.check_idle()


def test_preempted_it_is_computed_again(folder: Path) -> None:
    """One prompt is computed after the other, so it takes a hand here."""
    solo = Solo(folder, max_num_batched_tokens=32, max_model_len=96, enable_prefix_caching=False)
    (text,) = prompts(5, (90,))
    answer = embed(solo, text)
    solo.step()
    scheduler = solo.decode.parts.scheduler
    scheduler._preempt(scheduler.running[0])
    solo.run()
    assert np.abs(vector(answer) - reference_vector(folder, text)).max() < TOLERANCE
    assert answer.stats.preemptions == 1
    solo.check_idle()


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_cancels_deadlines_and_ends_leave_nothing(folder: Path, overlap: str) -> None:
    solo = Solo(folder, max_num_batched_tokens=32, max_model_len=128, async_scheduling=overlap)
    rng = random.Random(6)
    texts = prompts(6, [rng.randrange(1, 128) for _ in range(40)])
    answers = [embed(solo, text, remaining_s=0.5 if i % 10 == 3 else 0.0) for i, text in enumerate(texts)]
    for i, answer in enumerate(answers):
        if i % 5 == 0:
            solo.cancel(answer)
        if i == 20:
            solo.clock.advance(1.0)  # type: ignore[attr-defined]
        solo.step()
    solo.run()
    ends = {"cancelled": 0, "late": 0, "whole": 0}
    for text, answer in zip(texts, answers, strict=True):
        if answer.failure is not None:
            assert answer.failure.code == "deadline_exceeded"
            ends["late"] += 1
        elif answer.finish[0] is FinishReason.CANCELLED:
            ends["cancelled"] += 1
        else:
            assert np.abs(vector(answer) - reference_vector(folder, text)).max() < TOLERANCE
            ends["whole"] += 1
    assert ends["whole"] > 20
    assert ends["cancelled"] > 0
    solo.check_idle()
    solo.decode.engine.handle(Drain())
    refused = embed(solo, texts[0])
    solo.run(refused)
    assert refused.failure is not None
    assert refused.failure.code == "unavailable"


def test_numbers_that_are_none_fail_the_request_alone(folder: Path) -> None:
    solo = Solo(folder, max_model_len=128)
    weight = solo.decode.parts.runner._model.model.embed_tokens.weight  # type: ignore[attr-defined]
    good, bad = prompts(7, (20, 20))
    bad = (*bad[:-1], 77)
    good = tuple(5 if token == 77 else token for token in good)
    weight[77] = float("nan")
    broken, whole = embed(solo, bad), embed(solo, good)
    solo.run()
    assert broken.failure is not None
    assert broken.failure.code == "internal"
    assert np.abs(vector(whole) - reference_vector(folder, good)).max() < TOLERANCE


def test_it_is_computed_where_it_is_placed(folder: Path) -> None:
    pair = Pair(folder, max_model_len=128)
    (text,) = prompts(8, (100,))
    answer = embed(pair, text)
    pair.run()
    assert np.abs(vector(answer) - reference_vector(folder, text)).max() < TOLERANCE
    assert (answer.stats.transferred_tokens, answer.stats.computed_tokens) == (0, 100)
    pair.check_idle()


def test_two_ranks_make_the_same_vector(folder: Path) -> None:
    solo = Solo(folder, tensor_parallel_size=2, max_model_len=128)
    (text,) = prompts(9, (50,))
    answer = embed(solo, text)
    solo.run()
    assert np.abs(vector(answer) - reference_vector(folder, text)).max() < TOLERANCE
    solo.decode.close()


def test_without_a_normalize_module_it_has_its_own_length(tmp_path: Path) -> None:
    folder = tiny_models.make_qwen3_embedding(tmp_path, seed=4, normalize=False)
    solo = Solo(folder)
    (text,) = prompts(10, (30,))
    whole, short = embed(solo, text), embed(solo, text, 10)
    solo.run()
    expected = reference_vector(folder, text, normalize=False)
    assert np.abs(vector(whole) - expected).max() < 1e-4
    assert np.abs(vector(short) - expected[:10]).max() < 1e-4


def test_the_setting_decides_where_it_is_set(folder: Path, tmp_path: Path) -> None:
    """An embedding checkpoint with tied weights can still generate; a generating one can be made to embed."""
    solo = Solo(folder, runner="generate", max_model_len=128)
    (text,) = prompts(11, (30,))
    answer = solo.submit(text, greedy(4))
    solo.run()
    assert len(answer.tokens[0]) == 4
    for tied in (True, False):
        other = tiny_models.make_qwen3(tmp_path / str(tied), seed=5, tie_word_embeddings=tied)
        pooling = Solo(other, runner="pooling", max_model_len=128)
        embedded = embed(pooling, text)
        pooling.run()
        assert np.abs(vector(embedded) - reference_vector(other, text)).max() < TOLERANCE
        plain = Solo(other, max_model_len=128)
        assert_refused(plain, embed(plain, text), "model")


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_another_way_of_pooling_is_refused_by_its_name(tmp_path: Path, mode: str) -> None:
    folder = tiny_models.make_qwen3_embedding(tmp_path, mode=mode)
    with pytest.raises(ConfigError, match=rf"1_Pooling/config\.json: pooling_mode is {mode}; supported is lasttoken"):
        Solo(folder)


def test_layouts_that_would_make_other_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    made = tiny_models.make_qwen3_embedding(tmp_path, seed=3)
    modules = json.loads((made / "modules.json").read_text())

    def refused(content: Any, match: str) -> None:
        (made / "modules.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=match):
            Solo(made)

    refused([*modules, modules[0] | {"type": "sentence_transformers.models.Dense"}], "module Dense is not supported")
    refused([modules[0]], "no module Pooling")
    refused({"a": 1}, r"modules\.json cannot be read")
    refused([modules[0], modules[1] | {"path": "../elsewhere"}], "outside of its own")
    newer = {"pooling_mode": "lasttoken", "embedding_dimension": 48}
    (made / "1_Pooling" / "config.json").write_text(json.dumps(newer))
    refused(modules, "hidden size is 64")
    (made / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    (made / "modules.json").write_text(json.dumps(modules))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(ConfigError, match="is_causal is False"):
        Solo(made)
    with pytest.raises(ConfigError, match="speculative_config"):
        Solo(folder, speculative_config={"method": "ngram"})


def test_offline_embed_gives_vectors_in_the_order_of_prompts(folder: Path) -> None:
    asked = prompts(7, (40, 3, 90))
    told: list[tuple[int, int]] = []
    with LLM(folder, dtype="float32", max_model_len=128) as llm:
        outputs = llm.embed([list(p) for p in asked], progress=lambda done, total: told.append((done, total)))
        short = llm.embed(list(asked[0]), dimensions=8)
        some = llm.embed([list(asked[1]), [5] * 129], keep_errors=True)
        with pytest.raises(InvalidRequestError, match="129 tokens; the model takes at most 128"):
            llm.embed([[5] * 129])
        with pytest.raises(InvalidRequestError, match="embeddings and no text"):
            llm.generate([list(asked[0])])
    for prompt, output in zip(asked, outputs, strict=True):
        assert output.prompt_token_ids == list(prompt)
        assert np.abs(np.array(output.outputs.embedding) - reference_vector(folder, prompt)).max() < TOLERANCE
        assert output.stats.prompt_tokens == len(prompt)
    assert told[-1] == (3, 3)
    assert np.abs(np.array(short[0].outputs.embedding) - cut(reference_vector(folder, asked[0]), 8)).max() < TOLERANCE
    assert some[0].error is None
    assert "129 tokens" in str(some[1].error)


def test_a_model_for_text_embeds_with_the_pooling_runner_only(tmp_path: Path) -> None:
    folder = tiny_models.make_llama(tmp_path / "llama", seed=1)
    with LLM(folder, dtype="float32") as llm, pytest.raises(InvalidRequestError, match="text and no embeddings"):
        llm.embed([[1, 2, 3]])
    with LLM(folder, dtype="float32", runner="pooling") as llm:
        (output,) = llm.embed([[1, 2, 3]])
    assert np.linalg.norm(output.outputs.embedding) > 0
