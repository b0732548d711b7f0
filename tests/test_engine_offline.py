"""Offline generation through `LLM`: any number of prompts, and nothing left of a call that failed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import greedy, prompts, reference_tokens
from tiny_models import make_deepseek_v4, make_deepseek_v32, make_llama

from common.errors import ConfigError, InvalidRequestError
from nanodeploy import LLM, SamplingParams
from nanodeploy.prompts import many

OPTIONS = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 8 << 20, "check_ledger": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_llama(tmp_path_factory.mktemp("offline"), seed=1)
    (made / "tokenizer.json").unlink(missing_ok=True)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_num_seqs=256, **OPTIONS) as made:
        yield made


def test_more_prompts_than_a_server_would_queue_are_all_answered(llm: LLM, folder: Path) -> None:
    given = prompts(60, [3] * 1100)
    outputs = llm.generate(given, greedy(1))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1] * 1100
    for i in (0, 1024, 1099):
        assert outputs[i].outputs[0].token_ids == reference_tokens(folder, given[i], 1)


def test_a_call_that_fails_leaves_nothing_for_the_next_one(llm: LLM) -> None:
    (prompt,) = prompts(61, (40,))
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        llm.generate([prompt, "text"], greedy(30, prompt_logprobs=0))
    llm._built.parts.cache.check_idle()
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        llm.generate([prompt, (10**6,)], greedy(30, prompt_logprobs=0))
    llm._built.parts.cache.check_idle()
    (output,) = llm.generate([prompt], greedy(5))
    assert len(output.outputs[0].token_ids) == 5
    assert output.prompt_logprobs is None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("/nope", {}, "/nope: not a folder of a Hugging Face checkpoint: it has no config.json"),
        ("/nope", {"max_model_lem": 5}, "unknown option 'max_model_lem'; did you mean 'max_model_len'?"),
        ("/nope", {"max_model_len": -5}, "max_model_len: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_call_is_one_clear_line(model: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(model, **options)
    assert caught.value.message == message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("make", [make_deepseek_v32, make_deepseek_v4])
def test_a_checkpoint_without_a_template_chats(make: Callable[[Path], Path], tmp_path: Path) -> None:
    made = make(tmp_path)
    (made / "tokenizer_config.json").unlink()
    with LLM(made, **OPTIONS) as llm:
        output = llm.chat([{"role": "user", "content": "Hi"}], greedy(2))
        text = llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><")


def test_stops_wait_for_min_tokens_and_are_shown_where_asked_for(tmp_path: Path) -> None:
    with LLM(make_llama(tmp_path, seed=1), **OPTIONS) as llm:
        (prompt,) = prompts(62, (9,))
        ids = llm.generate([prompt], greedy(12))[0].outputs[0].token_ids
        texts = [llm.tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
        place = next(i for i in range(1, 12) if texts[i].isascii() and texts[i].strip() and texts[i] not in texts[:i])
        by_text, by_token = {"stop": (texts[place],)}, {"stop_token_ids": (ids[place],)}

        def answer(**fields: Any) -> Any:
            return llm.generate([prompt], greedy(12, **fields))[0].outputs[0]

        for stop in (by_text, by_token):
            found = answer(**stop, min_tokens=place)
            assert (found.token_ids, found.finish_reason) == (ids[: place + 1], "stop")
            shown = answer(**stop, min_tokens=place, include_stop_str_in_output=True)
            assert shown.text == found.text + texts[place]
            assert len(answer(**stop, min_tokens=place + 1).token_ids) > place + 1


def test_a_closed_one_holds_nothing_and_says_that_it_is_closed(folder: Path, tmp_path: Path) -> None:
    """A name that is bound anew keeps the old object until the new one is made: both models do not fit on a card."""
    llm = LLM(folder, **OPTIONS)
    llm.calibrate_kv([[1, 2, 3]], tmp_path / "scales.json")  # its attention goes through other hands
    runner = llm._built.compute.runner
    held = [weakref.ref(one) for one in (runner, runner._pool, runner._model)]
    del runner
    llm.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None, None]
    for call in (lambda: llm.generate([[1]]), lambda: llm.embed([[1]]), lambda: llm.max_model_len):
        with pytest.raises(ValueError, match="this LLM is closed"):
            call()
    llm.close()


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", [3]], ["a", [3]]),
        ({"prompt": "a"}, ["a"]),
        ([{"prompt_token_ids": [1], "prompt": "a"}, {"prompt": "b"}], [[1], "b"]),
        (np.array([1, 2]), [[1, 2]]),
        ([torch.tensor([1, 2]), "b"], [[1, 2], "b"]),
        ([], []),
    ],
)
def test_forms_of_prompts(given: Any, plain: list[Any]) -> None:
    found = many(given)
    assert found == plain
    assert all(type(one) is int for ids in found if isinstance(ids, list) for one in ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "type int"),
        ([1, "a"], "mixes token ids"),
        ([1.5], "type float"),
        ([[1, "a"]], "whole numbers, got 'a'"),
        ([[True]], "whole numbers, got True"),
        ({"promt": "a"}, "'promt'"),
        ({"prompt": "a", "multi_modal_data": {}}, "'multi_modal_data'"),
        ({}, "empty dict"),
        ({"prompt_token_ids": ["a"]}, "whole numbers, got 'a'"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name_and_the_next_call_answers(llm: LLM, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(given)
    (answer,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 2
