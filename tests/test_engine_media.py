"""Requests with images in an engine: the same tokens as transformers, however their prompt comes to be computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_support import Pair, Solo, greedy
from media_support import COUNT, ONE, THREE, ask, folder, handles, settle
from speculative_support import NGRAM, TestDrafter, use
from tiny_models import make_kimi_k25, make_qwen3_vl, make_qwen3_vl_moe
from vision_support import Illustrated, illustrated, oracle_logits, oracle_tokens

from common.engine.media import Fetched, MediaEmbeds
from common.engine.media_local import LocalMedia
from nanodeploy import LLM, MediaPrompt, MediaRows

__all__ = ["folder"]

MAKERS = {"qwen3-vl": make_qwen3_vl, "qwen3-vl-moe": make_qwen3_vl_moe, "kimi-k25": make_kimi_k25}


@pytest.fixture(scope="module", params=list(MAKERS))
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param), seed=4)


@pytest.mark.parametrize("budget", [2048, 7])
def test_whole_or_in_chunks_and_beside_strangers(each: Path, budget: int) -> None:
    """The first image is wider than a chunk, so chunks end inside of it."""
    source = LocalMedia()
    solo = Solo(each, media=source, max_num_batched_tokens=budget)
    prompts = [illustrated(each, layout, 10 + i) for i, layout in enumerate((ONE, (33,), THREE))]
    asked = [(p, ask(solo, source, p)) for p in prompts]
    solo.step()
    late = illustrated(each, ONE, 20)
    asked.append((late, ask(solo, source, late)))
    for prompt, answer in asked:
        settle(solo, each, prompt, answer)
    solo.check_idle()


def test_a_prefix_is_shared_by_equal_images_alone(each: Path) -> None:
    source = LocalMedia()
    solo = Solo(each, media=source, block_size=16)
    prompt = illustrated(each, ONE, 30)
    settle(solo, each, prompt, ask(solo, source, prompt))
    again = ask(solo, source, prompt)
    settle(solo, each, prompt, again)
    assert again.stats.cached_tokens == len(prompt.tokens) // 16 * 16 > prompt.pictures[0].position + 16
    other = illustrated(each, ONE, 31)
    swapped = Illustrated(prompt.tokens, other.pictures, other.pixels_PC, other.patches_G3, prompt.kinds_T)
    changed = ask(solo, source, swapped)
    settle(solo, each, swapped, changed)
    assert changed.stats.cached_tokens == prompt.pictures[0].position // 16 * 16
    solo.check_idle()


def test_a_hit_may_end_inside_an_image(folder: Path) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source)
    long = illustrated(folder, (5, (1, 16, 12), 30), 32)
    settle(solo, folder, long, ask(solo, source, long))
    tokens = long.tokens[:]
    tokens[60] = 77  # the image is tokens 6 to 53
    changed = Illustrated(tokens, long.pictures, long.pixels_PC, long.patches_G3, long.kinds_T)
    answer = ask(solo, source, changed)
    settle(solo, folder, changed, answer)
    assert answer.stats.cached_tokens == 48
    solo.check_idle()


def test_preempted_and_computed_again(each: Path) -> None:
    source = LocalMedia()
    whole = Solo(each, media=source).decode.ready.layout
    nbytes = 11 * whole.block_nbytes(whole.groups[0].name) + 16_384  # 11 blocks; four sequences grow to 24
    solo = Solo(each, media=source, kv_cache_memory_bytes=nbytes, max_model_len=128, max_num_seqs=4)
    prompts = [illustrated(each, ONE, 40 + i) for i in range(4)]
    count = 40
    answers = [ask(solo, source, p, params=greedy(count)) for p in prompts]
    solo.run()
    assert sum(a.stats.preemptions for a in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens[0] == oracle_tokens(each, prompt, count)
    solo.check_idle()


def test_resumed_after_output(folder: Path) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source)
    prompt = illustrated(folder, THREE, 50)
    sent = tuple(oracle_tokens(folder, prompt, COUNT)[:5])
    answer = ask(solo, source, prompt, sent=(sent,))
    settle(solo, folder, prompt, answer)


def test_choices_share_the_rows(folder: Path) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source)
    prompt = illustrated(folder, ONE, 51)
    answer = ask(solo, source, prompt, params=greedy(COUNT, n=3))
    solo.run()
    assert [answer.tokens[c] for c in range(3)] == [oracle_tokens(folder, prompt, COUNT)] * 3
    solo.check_idle()


def test_rows_are_taken_in_any_type(folder: Path) -> None:
    """A bf16 engine rounds fp32 rows as their maker would have, and may run beside text in the same step."""
    source = LocalMedia()
    solo = Solo(folder, media=source, dtype="bfloat16")
    prompt = illustrated(folder, THREE, 55)
    asked = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [source.put(p.position, p.rows_NW.to(torch.bfloat16).to(dtype), p.grid) for p in prompt.pictures]
        asked.append(solo.submit(prompt.tokens, greedy(COUNT), embeddings=tuple(given)))
    solo.run()
    assert asked[0].tokens == asked[1].tokens
    assert len(asked[0].tokens[0]) == COUNT
    assert asked[1].stats.cached_tokens == 0, "the two have different bytes"


def test_prompt_logprobs(folder: Path) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source, max_num_batched_tokens=11)
    prompt = illustrated(folder, ONE, 52)
    answer = ask(solo, source, prompt, params=greedy(1, prompt_logprobs=0))
    solo.run()
    assert answer.prompt_logprobs is not None
    logprobs = oracle_logits(folder, prompt).log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt.tokens[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer.prompt_logprobs.token_logprobs), expected, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_drafts_behind_an_image(each: Path, share: float) -> None:
    source = LocalMedia()
    solo = Solo(each, media=source, speculative_config=NGRAM)
    prompt, params = illustrated(each, THREE, 53), greedy(COUNT)
    drafter = TestDrafter(share)
    drafter.known[tuple(prompt.tokens), params, 0] = oracle_tokens(each, prompt, COUNT)
    use(solo, drafter)
    settle(solo, each, prompt, ask(solo, source, prompt))
    speculator = solo.decode.parts.speculator
    assert speculator is not None
    assert speculator.num_accepted_tokens > 0
    solo.check_idle()


def test_prompt_logprobs_of_placeholders_past_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source, folder = LocalMedia(), make_kimi_k25(tmp_path)
    solo = Solo(folder, media=source)
    answer = ask(solo, source, illustrated(folder, ONE, 54), params=greedy(1, prompt_logprobs=0))
    solo.step()
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) == ("invalid_request", "prompt_logprobs")


# -- hand-off --


@pytest.mark.parametrize("budget", [2048, 32])
def test_handed_over(each: Path, budget: int) -> None:
    source = LocalMedia()
    pair = Pair(each, prefill={"media": source, "max_num_batched_tokens": budget}, media=source)
    for seed, layout in ((60, ONE), (61, THREE), (60, ONE)):
        prompt = illustrated(each, layout, seed)
        answer = ask(pair, source, prompt)
        settle(pair, each, prompt, answer)
        assert not answer.stats.fallback
    assert answer.stats.cached_tokens > 0, "the third is the first again"
    assert pair.decode.parts.reader.counters.done == 3
    pair.check_idle()


def test_a_prefill_worker_without_the_rows_is_done_without(folder: Path) -> None:
    source = LocalMedia()
    pair = Pair(folder, prefill={"media": LocalMedia()}, media=source)
    prompt = illustrated(folder, ONE, 62)
    answer = ask(pair, source, prompt)
    settle(pair, folder, prompt, answer)
    assert answer.stats.fallback == "rejected"
    pair.check_idle()


@pytest.mark.parametrize("after", range(5))
def test_a_prefill_worker_is_lost(each: Path, after: int) -> None:
    source = LocalMedia()
    pair = Pair(each, prefill={"media": source, "max_num_batched_tokens": 16}, media=source)
    pair.network.held = True
    prompt = illustrated(each, THREE, 63)
    answer = ask(pair, source, prompt)
    for _ in range(after):
        pair.step()
        pair.network.step()
    pair.kill_prefill()
    settle(pair, each, prompt, answer)
    pair.check_idle()


def test_a_different_image_is_never_handed_over(folder: Path) -> None:
    """The two sides disagree about the image: what comes back is refused, and computed here."""
    source = LocalMedia()
    pair = Pair(folder, prefill={"media": source}, media=source)
    place = pair.prefill.engine.handle

    def bend(message: Any) -> None:
        if getattr(message, "embeddings", ()):
            wrong = [msgspec.structs.replace(h, media_hash=bytes(16)) for h in message.embeddings]
            message = msgspec.structs.replace(message, embeddings=tuple(wrong))
        place(message)

    pair.prefill.engine.handle = bend  # type: ignore[method-assign]
    prompt = illustrated(folder, ONE, 64)
    answer = ask(pair, source, prompt)
    settle(pair, folder, prompt, answer)
    assert answer.stats.fallback == "prefix_hash"
    pair.check_idle()


# -- fetching --


class SlowSource(LocalMedia):
    """Gives what it has only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.open = False
        self.cancelled: list[int] = []

    def poll(self) -> Sequence[Fetched]:
        return super().poll() if self.open else ()

    def next_deadline(self) -> float:
        return math.inf

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        super().cancel(ticket)


def test_nobody_waits_for_the_images_of_another(folder: Path) -> None:
    source = SlowSource()
    solo = Solo(folder, media=source, max_num_seqs=1)
    prompt, text = illustrated(folder, ONE, 70), illustrated(folder, (20,), 71)
    slow, quick = ask(solo, source, prompt), ask(solo, source, text)
    settle(solo, folder, text, quick)
    solo.step()
    assert not slow.tokens
    assert solo.decode.engine.stalled
    source.open = True
    settle(solo, folder, prompt, slow)
    solo.check_idle()


def test_an_order_is_placed_while_the_images_come(folder: Path) -> None:
    here, there = SlowSource(), LocalMedia()
    pair = Pair(folder, prefill={"media": there}, media=here)
    prompt = illustrated(folder, ONE, 72)
    handles(there, prompt)  # under the same numbers
    answer = ask(pair, here, prompt)
    settle(pair, folder, prompt, answer)
    assert answer.stats.transferred_tokens == len(prompt.tokens)
    pair.check_idle()


def test_a_failed_hand_off_waits_for_the_images(folder: Path) -> None:
    here = SlowSource()
    pair = Pair(folder, prefill={"media": LocalMedia()}, media=here)
    prompt = illustrated(folder, ONE, 73)
    answer = ask(pair, here, prompt)
    for _ in range(10):
        pair.step()
    assert not answer.tokens
    here.open = True
    settle(pair, folder, prompt, answer)


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_request_may_end_while_its_images_come(folder: Path, end: str) -> None:
    source = SlowSource()
    solo = Solo(folder, media=source)
    answer = ask(solo, source, illustrated(folder, THREE, 74), remaining_s=5.0)
    solo.step()
    assert solo.decode.parts.media.num_fetching == 3
    if end == "cancel":
        solo.cancel(answer)
    else:
        solo.clock.advance(6.0)  # type: ignore[attr-defined]
    solo.run()
    assert source.cancelled == [1, 2, 3]
    assert solo.decode.parts.media.num_fetching == 0
    source.open = True
    solo.check_idle()


def test_a_handle_passed_on_has_less_time_left() -> None:
    handle = LocalMedia().put(0, torch.zeros(1, 4), (1, 1, 1))
    leased = msgspec.structs.replace(handle, remaining_ms=1000)
    embeds = MediaEmbeds((leased, handle), True, 10.0, lambda error: None, [None, None])
    assert [h.remaining_ms for h in embeds.handles_at(10.25)] == [750, 0]
    assert [h.remaining_ms for h in embeds.handles_at(99.0)] == [1, 0]


def test_offline(each: Path) -> None:
    prompts = [illustrated(each, layout, 90 + i) for i, layout in enumerate((ONE, (33,), THREE))]
    given = [MediaPrompt(p.tokens, [MediaRows(i.position, i.rows_NW, i.grid) for i in p.pictures]) for p in prompts]
    with LLM(each, dtype="float32", kv_cache_memory_bytes=8 << 20) as llm:
        outputs = llm.generate(given, greedy(COUNT))
        assert [o.outputs[0].token_ids for o in outputs] == [oracle_tokens(each, p, COUNT) for p in prompts]
        assert not llm._local.media._rows


def test_offline_ids_and_grids_may_be_tensors(folder: Path) -> None:
    """As the processors of transformers give them."""
    prompt = illustrated(folder, ONE, 94)
    (picture,) = prompt.pictures
    rows = MediaRows(picture.position, picture.rows_NW, torch.tensor(picture.grid))  # type: ignore[arg-type]
    with LLM(folder, dtype="float32", kv_cache_memory_bytes=8 << 20) as llm:
        (output,) = llm.generate(MediaPrompt(torch.tensor(prompt.tokens), [rows]), greedy(COUNT))  # type: ignore[arg-type]
        assert output.outputs[0].token_ids == oracle_tokens(folder, prompt, COUNT)
        assert all(type(token_id) is int for token_id in output.prompt_token_ids)


def test_offline_what_is_no_image_is_told_before_anything_runs(folder: Path) -> None:
    """A grid of two numbers ended the step of everybody; of an image that was refused those before it stayed."""
    prompt = illustrated(folder, ONE, 95)
    (picture,) = prompt.pictures
    position, rows_NW, grid = picture.position, picture.rows_NW, picture.grid
    good = MediaRows(position, rows_NW, grid)
    wrong: list[tuple[Any, Any, Any]] = [
        (position, rows_NW, grid[1:]),
        (position, rows_NW, (1.0, 5.0, 4.0)),
        (position, rows_NW[0], grid),
        (position, rows_NW.numpy(), grid),
        (float(position), rows_NW, grid),
    ]
    with LLM(folder, dtype="float32", kv_cache_memory_bytes=8 << 20) as llm:
        for fields in wrong:
            with pytest.raises(ValueError, match="image"):
                llm.generate([MediaPrompt(prompt.tokens, [good, MediaRows(*fields)])], greedy(COUNT), keep_errors=True)
            assert not llm._local.media._rows
        with pytest.raises(ValueError, match="token ids"):
            llm.generate([MediaPrompt([*prompt.tokens, 0.5], [good])], greedy(COUNT))  # type: ignore[list-item]
        (output,) = llm.generate(MediaPrompt(prompt.tokens, [good]), greedy(COUNT))
        assert output.outputs[0].token_ids == oracle_tokens(folder, prompt, COUNT)
