"""Where drafts come from and how many there are: the n-gram drafter, the pace of a sequence, and the settings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import llama
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.config import SpeculativeConfig
from common.config.load import load
from common.engine.pace import MAX_WAIT_STEPS, MIN_WAIT_STEPS, Pace, price
from common.engine.sequence import Sequence
from common.engine.speculative import NgramDrafter, continuation, lookup_lengths
from common.errors import ConfigError
from common.types import SamplingParams
from nanodeploy import LLM
from services.cli.main import app

__all__ = ["llama"]


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence(
        seq_id=1,
        slot=1,
        choice=0,
        label="r",
        token_ids=token_ids,
        num_prompt=1,
        sampling=SamplingParams(max_tokens=1000),
        stop_ids=frozenset(),
        chain=[b""],
        priority=0,
        arrival=1,
        deadline=0.0,
    )


def plainly(ids: list[int], least: int, most: int) -> int:
    for length in range(min(most, len(ids) - 1), least - 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                return end
    return -1


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=60), least=st.integers(1, 4), more=st.integers(0, 3))
def test_the_latest_place_of_the_longest_end_is_found(ids: list[int], least: int, more: int) -> None:
    assert continuation(np.array(ids, np.int64), least, least + more) == plainly(ids, least, least + more)


def test_drafts_follow_what_followed_before() -> None:
    drafter = NgramDrafter(2, 3)
    seq = sequence([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert drafter.propose(seq, 4) == [4, 5, 6, 9]
    seq.token_ids += [4, 7]
    assert drafter.propose(seq, 4) == []
    seq.token_ids += [8, 2, 3]
    assert drafter.propose(seq, 2) == [4, 7], "the latest place counts"
    assert drafter.propose(sequence([1, 2, 3, 4, 9, 1, 2, 3]), 1) == [4], "each sequence has its own text"


def test_a_repetition_goes_on_past_the_end_of_the_text() -> None:
    assert NgramDrafter(1, 3).propose(sequence([9, 5, 5]), 4) == [5, 5, 5, 5]
    assert NgramDrafter(2, 3).propose(sequence([9, 1, 2, 3, 1, 2, 3, 1, 2]), 4) == [3, 1, 2, 3]


def test_a_text_of_one_token_has_no_place() -> None:
    assert NgramDrafter(1, 3).propose(sequence([9]), 4) == []


def test_the_texts_of_ended_sequences_are_not_kept() -> None:
    drafter = NgramDrafter(1, 3)
    for i in range(100):
        drafter.propose(sequence([i, i]), 1)
    assert len(drafter._texts) <= 1


def run(pace: Pace, share: float, steps: int, most: int = 4, seed: int = 1, cost: float = 0.15) -> tuple[int, int]:
    """(tokens gained, drafts made) in so many steps, each draft being right with probability `share`."""
    rng = random.Random(seed)
    before = pace.num_accepted_tokens, pace.num_draft_tokens
    for _ in range(steps):
        count = pace.allow(most, cost)
        if count:
            right = next((i for i in range(count) if rng.random() >= share), count)
            pace.observe(count, right)
    return pace.num_accepted_tokens - before[0], pace.num_draft_tokens - before[1]


def test_a_pace_goes_up_with_right_drafts_and_stays_there() -> None:
    pace = Pace()
    gained, made = run(pace, 1.0, 100)
    assert gained == made
    assert made > 4 * 95


def test_a_pace_follows_the_share_of_right_drafts() -> None:
    lengths = []
    for share in (0.2, 0.5, 0.7, 0.9):
        pace = Pace()
        made = run(pace, share, 3000)[1]
        lengths.append(made / 3000)
    assert lengths == sorted(lengths)
    assert lengths[0] < 1.0
    assert lengths[3] > 3.0


def test_failing_drafts_cost_next_to_nothing_and_good_ones_are_found_again() -> None:
    pace = Pace()
    assert run(pace, 0.0, 2000) == (0, pace.num_draft_tokens)
    assert pace.num_draft_tokens < 35
    assert MIN_WAIT_STEPS < pace.last_wait == MAX_WAIT_STEPS
    gained, _ = run(pace, 1.0, MAX_WAIT_STEPS + 50)
    assert gained > 4 * 40


def test_drafts_that_must_be_right_more_often_are_fewer() -> None:
    """The more sequences share a step, the less a right draft saves."""
    costs = [price(0.02, n) for n in (1, 8, 32, 256)]
    assert costs == sorted(costs)
    assert costs[0] < 0.1
    made = [run(Pace(), 0.6, 2000, cost=cost)[1] for cost in costs]
    assert made == sorted(made, reverse=True)
    assert made[0] > 3 * 2000
    assert made[-1] < 0.35 * 2000
    gained, made_of_best = run(Pace(), 0.97, 500, cost=costs[-1])
    assert gained > 500
    assert made_of_best < gained * 1.1


def test_a_waiting_pace_goes_on_when_drafts_become_cheap() -> None:
    pace = Pace()
    run(pace, 0.3, 40, cost=0.9)
    assert pace.wait
    assert pace.allow(4, 0.9) == 0
    assert pace.allow(4, min(pace.rate, 0.05)) >= 1


def test_a_pace_depends_on_its_own_history_alone() -> None:
    one, other = Pace(), Pace()
    assert run(one, 0.6, 500) == run(other, 0.6, 500)
    assert one == other


def test_a_pace_without_room_makes_no_draft() -> None:
    assert Pace().allow(0, 0.15) == 0


@pytest.mark.parametrize(
    ("given_", "wanted"), [({}, (2, 5)), ({"prompt_lookup_max": 4}, (4, 4)), ({"prompt_lookup_min": 3}, (3, 3))]
)
def test_lookup_lengths_that_are_not_given_are_vllms(given_: dict[str, Any], wanted: tuple[int, int]) -> None:
    assert lookup_lengths(SpeculativeConfig(method="ngram", **given_)) == wanted
    assert lookup_lengths(SpeculativeConfig(prompt_lookup_min=2, prompt_lookup_max=3)) == (2, 3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "eagle"}, "speculative_config.method: .*'none', 'ngram' or 'mtp'"),
    ({"method": "ngram", "num_speculative_tokens": 5}, "num_speculative_tokens: .*less than or equal to 4"),
    ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens: .*greater than or equal to 1"),
    ({"method": "ngram", "lookup": 3}, "speculative_config.lookup: "),
    (
        {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3},
        "prompt_lookup_min 3 is greater than prompt_lookup_max 2",
    ),
    ({"method": "mtp"}, r"\(llama\) has no multi-token-prediction layer"),
]


@pytest.mark.parametrize(("config", "words"), BAD)
def test_bad_settings_are_one_clear_error(llama: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(llama, dtype="float32", kv_cache_memory_bytes=8 << 20, speculative_config=config)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("3", "must be a JSON object"), ('{"method": "x"}', "method")]
)
@pytest.mark.parametrize("command", ["serve", "generate"])
def test_the_flag_takes_json(llama: Path, tmp_path: Path, text: str, words: str, command: str) -> None:
    given_ = ["serve", str(llama)] if command == "serve" else ["generate", "--model", str(llama)]
    env = {"NANODEPLOY_STATE_DIR": str(tmp_path)}
    done = CliRunner().invoke(app, [*given_, "--speculative-config", text], input="hello\n", env=env)
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert "speculative" in str(done.exception)


def test_the_file_and_the_environment_name_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("decode: {engine: {speculative_config: {method: ngram, num_speculative_tokens: 2}}}\n")
    loaded = load(str(file), {"NANODEPLOY_DECODE__ENGINE__SPECULATIVE_CONFIG__PROMPT_LOOKUP_MAX": "7"})
    assert loaded.decode.engine.speculative_config == SpeculativeConfig(
        method="ngram", num_speculative_tokens=2, prompt_lookup_max=7
    )
    assert loaded.prefill.engine.speculative_config.method == "none"


def test_llm_answers_are_the_same_token_by_token(llama: Path) -> None:
    """Text, tokens, logprobs and reasons; also where a stop string ends in the middle of what one step brought."""
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 8 << 20, "num_threads": 1}
    bias = ((71, 30.0), (72, 30.0), (73, 30.0))
    plain = SamplingParams(max_tokens=40, seed=3, logit_bias=bias, logprobs=1, ignore_eos=True)
    with LLM(llama, **options) as llm:
        text = llm.generate([(5, 6, 7)], plain)[0].outputs[0].text
        stop = text[7:9]
        wanted = llm.generate([(5, 6, 7)] * 2, [plain, SamplingParams(**as_dict(plain), stop=(stop,))])
    with LLM(llama, **options, speculative_config={"method": "ngram", "prompt_lookup_min": 1}) as llm:
        got = llm.generate([(5, 6, 7)] * 2, [plain, SamplingParams(**as_dict(plain), stop=(stop,))])
        speculator = llm._built.parts.speculator
        assert speculator is not None
        assert speculator.num_accepted_tokens > 5
    for one, other in zip(got, wanted, strict=True):
        mine, theirs = one.outputs[0], other.outputs[0]
        assert (mine.text, mine.token_ids, mine.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
        assert len(mine.logprobs) == len(mine.token_ids) == len(theirs.logprobs)
        assert mine.stop_reason == theirs.stop_reason
    assert got[1].outputs[0].stop_reason == stop


def as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__ if name != "stop"}
