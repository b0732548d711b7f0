"""What an engine promises of a request: limits, ends, choices, logprobs, errors; and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import Answer, Solo, greedy, llama, prompts, reference_tokens
from transformers import AutoModelForCausalLM

from common.engine.messages import Deltas, Drain, PromptLogprobsOf, Submit
from common.engine.outbox import Outbox
from common.engine.requests import ModelLimits, Requests
from common.types import ChoiceDelta, EmbeddingHandle, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs

__all__ = ["llama"]

(PROMPT,) = prompts(50, (40,))


@pytest.fixture(scope="module")
def solo(llama: Path) -> Solo:
    return Solo(llama, max_model_len=128, max_num_seqs=8, max_waiting_seqs=20)


def test_max_tokens_and_the_models_length_end_with_length(solo: Solo, llama: Path) -> None:
    short = solo.submit(PROMPT, greedy(3))
    long = solo.submit(PROMPT, greedy(1000))
    solo.run()
    assert short.tokens[0] == reference_tokens(llama, PROMPT, 3)
    assert len(long.tokens[0]) == 128 - 40
    assert short.finish[0] is long.finish[0] is FinishReason.LENGTH
    solo.check_idle()


def test_stop_token_ids_end_with_stop_and_are_the_last_token(solo: Solo, llama: Path) -> None:
    expected = reference_tokens(llama, PROMPT, 20)
    stop = expected[5]
    first = expected.index(stop)
    answer = solo.submit(PROMPT, greedy(20, stop_token_ids=(stop,)))
    solo.run()
    assert answer.tokens[0] == expected[: first + 1]
    assert answer.finish[0] is FinishReason.STOP


def test_min_tokens_keeps_stop_tokens_away_until_it_is_reached(solo: Solo, llama: Path) -> None:
    expected = reference_tokens(llama, PROMPT, 20)
    answer = solo.submit(PROMPT, greedy(20, stop_token_ids=(expected[0],), min_tokens=6))
    solo.run()
    assert expected[0] not in answer.tokens[0][:6]
    assert len(answer.tokens[0]) >= 6


def test_the_end_of_sequence_token_stops_unless_ignored(solo: Solo) -> None:
    bias = ((2, 100.0),)  # the tiny models' EOS
    stopped = solo.submit(PROMPT, greedy(8, ignore_eos=False, logit_bias=bias))
    ignored = solo.submit(PROMPT, greedy(8, logit_bias=bias))
    solo.run()
    assert (stopped.tokens[0], stopped.finish[0]) == ([2], FinishReason.STOP)
    assert (ignored.tokens[0], ignored.finish[0]) == ([2] * 8, FinishReason.LENGTH)


def test_logprobs_are_the_models_own(solo: Solo, llama: Path) -> None:
    answer = solo.submit(PROMPT, greedy(4, logprobs=3, prompt_logprobs=2))
    solo.run()
    whole = list(PROMPT) + answer.tokens[0]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        expected = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
    given = answer.prompt_logprobs
    assert given is not None
    assert len(given.token_logprobs) == len(PROMPT) - 1
    for i, value in enumerate(given.token_logprobs):
        assert value == pytest.approx(expected[i, PROMPT[i + 1]].item(), abs=1e-3)
    assert given.top_ids[:2] == tuple(expected[0].topk(2).indices.tolist())
    assert len(answer.logprobs[0]) == 4
    for i, value in enumerate(answer.logprobs[0]):
        at = len(PROMPT) - 1 + i
        assert value == pytest.approx(expected[at, whole[at + 1]].item(), abs=1e-3)


def test_prompt_logprobs_are_whole_over_chunks_and_cached_prefixes(llama: Path) -> None:
    solo = Solo(llama, max_num_batched_tokens=7)
    solo.submit(PROMPT, greedy(2))
    solo.run()
    chunked = solo.submit(PROMPT, greedy(2, prompt_logprobs=0))
    solo.run()
    whole = Solo(llama)
    expected = whole.submit(PROMPT, greedy(2, prompt_logprobs=0))
    whole.run()
    assert chunked.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    assert chunked.prompt_logprobs.token_logprobs == pytest.approx(expected.prompt_logprobs.token_logprobs, abs=1e-3)


def test_one_choice_can_be_cancelled_and_the_others_go_on(solo: Solo) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=9, n=3)
    alone = solo.submit(PROMPT, params)
    solo.run(alone)
    answer = solo.submit(PROMPT, params)
    while len(answer.tokens) < 3:
        solo.step()
    solo.cancel(answer, 1)
    solo.run(answer)
    assert answer.finish[1] is FinishReason.CANCELLED
    assert answer.tokens[0] == alone.tokens[0]
    assert answer.tokens[2] == alone.tokens[2]
    solo.check_idle()


def test_cancelling_the_first_choice_before_its_prompt_frees_the_others(llama: Path) -> None:
    solo = Solo(llama, max_num_batched_tokens=8)
    answer = solo.submit(PROMPT, SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True, seed=9, n=3))
    solo.step()
    solo.cancel(answer, 0)
    solo.run(answer)
    assert answer.finish[0] is FinishReason.CANCELLED
    assert len(answer.tokens[1]) == len(answer.tokens[2]) == 5
    solo.check_idle()


def test_a_resumed_request_runs_only_its_open_choices(solo: Solo) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True, seed=5, n=3)
    whole = solo.submit(PROMPT, params)
    solo.run(whole)
    sent = (tuple(whole.tokens[0]), tuple(whole.tokens[1][:4]), ())
    resumed = solo.submit(PROMPT, params, sent=sent, ended_choices=(0,))
    solo.run(resumed)
    assert resumed.tokens[1] == whole.tokens[1]
    assert resumed.tokens[2] == whole.tokens[2]
    assert 0 not in resumed.finish


HANDLE = EmbeddingHandle(
    owner_id="e",
    owner_epoch=1,
    owner_address="x:1",
    lease_id=1,
    media_hash=bytes(16),
    position=0,
    num_tokens=1,
    grid=(1, 1, 1),
    hidden_size=64,
    dtype="float32",
    descriptor=b"",
    digest=0,
    transport="ucx",
    remaining_ms=1,
)


@pytest.mark.parametrize(
    ("prompt", "params", "request_", "code", "words"),
    [
        ((), greedy(1), {}, "invalid_request", "no tokens"),
        ((5,) * 128, greedy(1), {}, "invalid_request", "128 tokens; the model takes at most 127"),
        ((5, 10**6), greedy(1), {}, "invalid_request", "1000000 is outside the vocabulary of 512"),
        ((5, -1), greedy(1), {}, "invalid_request", "-1 is outside"),
        ((5,), greedy(1, n=9), {}, "invalid_request", "runs 8 at most"),
        ((5,), greedy(1, seed=None), {}, "invalid_request", "seed"),
        ((5,), greedy(1, logit_bias=((600, 1.0),)), {}, "invalid_request", "600"),
        ((5,), greedy(1), {"adapter_id": "lora"}, "invalid_request", "lora"),
        ((5,), greedy(1), {"embeddings": (HANDLE,)}, "invalid_request", "no images"),
        ((5,), greedy(2), {"sent": ((1, 2),)}, "invalid_request", "nothing left"),
    ],
)
def test_bad_requests_are_refused_by_name(
    solo: Solo, prompt: tuple[int, ...], params: SamplingParams, request_: dict[str, Any], code: str, words: str
) -> None:
    answer = solo.submit(prompt, params, **request_)
    answer.tokens.clear()
    solo.step()
    assert answer.failure is not None
    assert answer.failure.code == code
    assert words in answer.failure.message


def test_prompt_logprobs_that_no_message_can_hold_are_refused(solo: Solo) -> None:
    """20 tokens with 3 alternatives take 20 * (4 + 3 * 9) bytes at most."""
    parts, said = solo.decode.parts, Outbox()
    limits = ModelLimits(b"m", 128, 512, frozenset(), 20, 8, max_prompt_logprobs_nbytes=620)
    requests = Requests(limits, parts.scheduler, parts.media, said, parts.clock)

    def failures(num_tokens: int, top_n: int) -> list[str]:
        asked = GenerationRequest(
            request_id="r", model="m", prompt_token_ids=(5,) * num_tokens, sampling=greedy(1, prompt_logprobs=top_n)
        )
        requests.submit(Submit(1, asked))
        requests.cancel(1, None)
        deltas = [m for m in said.drain(0) if isinstance(m, Deltas)]
        return [f.failure.message for m in deltas for f in m.failures]

    assert failures(20, 3) == failures(100, 0) == []
    assert failures(21, 3) == [
        "prompt logprobs of 21 tokens with 3 alternatives would be a reply of up to 651 bytes; the limit is 620"
    ]


def test_each_prompts_logprobs_are_a_message_ahead_of_the_rows() -> None:
    outbox = Outbox()
    outbox.delta(1, ChoiceDelta(choice=0, position=0, token_ids=(7,)))
    replies = [PromptLogprobsOf(slot, TokenLogprobs((-1.0,), 0, (), ())) for slot in (1, 2)]
    for reply in replies:
        outbox.prompt_logprobs(reply)
    first, second, last = (m for m in outbox.drain(5) if isinstance(m, Deltas))
    assert [first.prompt_logprobs, second.prompt_logprobs] == [(replies[0],), (replies[1],)]
    assert (first.rows, second.rows, len(last.rows), last.prompt_logprobs) == ((), (), 1, ())
    assert outbox.drain(6) == []


def test_a_row_without_an_allowed_token_fails_alone(solo: Solo, llama: Path) -> None:
    everything = tuple((i, -100.0) for i in range(512))
    nan = solo.submit(PROMPT, greedy(4, logit_bias=everything))
    good = solo.submit(PROMPT, greedy(4))
    solo.run()
    assert good.tokens[0] == reference_tokens(llama, PROMPT, 4)
    assert nan.ended
    solo.check_idle()


def test_a_full_queue_refuses_and_a_draining_engine_finishes(llama: Path) -> None:
    solo = Solo(llama, max_num_seqs=2, max_waiting_seqs=3)
    answers = [solo.submit(PROMPT, greedy(4)) for _ in range(5)]
    solo.step()
    refused = [a for a in answers if a.failure is not None]
    assert [a.failure.code for a in refused if a.failure] == ["overloaded"] * 2
    solo.decode.engine.handle(Drain())
    late = solo.submit(PROMPT, greedy(4))
    solo.run()
    assert late.failure is not None
    assert late.failure.code == "unavailable"
    assert sum(len(a.tokens.get(0, ())) == 4 for a in answers) == 3
    solo.check_idle()


def test_a_deadline_ends_a_running_request(llama: Path) -> None:
    solo = Solo(llama)
    slow = solo.submit(PROMPT, greedy(400), remaining_s=10.0)
    for _ in range(5):
        solo.step()
    assert slow.tokens[0]
    solo.clock.advance(10.5)  # type: ignore[attr-defined]
    solo.run(slow)
    assert slow.failure is not None
    assert slow.failure.code == "deadline_exceeded"
    solo.check_idle()


def test_smaller_priority_runs_first(llama: Path) -> None:
    solo = Solo(llama, max_num_seqs=1)
    running = solo.submit(PROMPT, greedy(3))
    solo.step()
    later = solo.submit(PROMPT, greedy(3), priority=5)
    sooner = solo.submit(PROMPT, greedy(3), priority=-5)
    solo.run(sooner)
    assert running.ended
    assert not later.tokens
    solo.run(later)


def test_a_step_that_raises_fails_what_was_in_it_and_nothing_else(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solo = Solo(llama)
    runner = solo.decode.parts.runner
    forward = runner.forward

    def broken(batch: Any) -> Any:
        raise RuntimeError("boom")

    doomed = solo.submit(PROMPT, greedy(4))
    monkeypatch.setattr(runner, "forward", broken)
    solo.step()
    monkeypatch.setattr(runner, "forward", forward)
    assert doomed.failure is not None
    assert doomed.failure.code == "internal"
    fine = solo.submit(PROMPT, greedy(4))
    solo.run(fine)
    assert fine.tokens[0] == reference_tokens(llama, PROMPT, 4)
    solo.check_idle()
    monkeypatch.setattr(runner, "forward", broken)
    for _ in range(2):
        solo.submit(PROMPT, greedy(4))
        solo.step()
    solo.submit(PROMPT, greedy(4))
    with pytest.raises(RuntimeError, match="boom"):
        solo.step()


def accounted(answer: Answer) -> int:
    s = answer.stats
    return s.cached_tokens + s.computed_tokens + s.transferred_tokens


def test_prompt_logprobs_come_once_though_the_prompt_was_preempted_midway(llama: Path) -> None:
    few_blocks: dict[str, Any] = {"kv_cache_memory_bytes": 175_000, "max_model_len": 192, "max_num_seqs": 6}
    solo = Solo(llama, max_num_batched_tokens=16, **few_blocks)
    first, second, third = prompts(51, (100, 100, 120))
    early = [solo.submit(p, greedy(60)) for p in (first, second)]
    late = solo.submit(third, greedy(4, prompt_logprobs=0))
    solo.run()
    assert late.stats.preemptions > 0
    assert late.prompt_logprobs is not None
    assert len(late.prompt_logprobs.token_logprobs) == len(third) - 1
    whole = Solo(llama)
    expected = whole.submit(third, greedy(4, prompt_logprobs=0))
    whole.run()
    assert expected.prompt_logprobs is not None
    assert late.prompt_logprobs.token_logprobs == pytest.approx(expected.prompt_logprobs.token_logprobs, abs=1e-3)
    assert [accounted(a) for a in (*early, late)] == [100, 100, 120]
    solo.check_idle()


def test_choices_share_a_prompt_whose_logprobs_are_wanted(solo: Solo, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts(52, (48,))
    computed: list[int] = []
    monkeypatch.setattr(solo.decode.parts.meter, "step", lambda plan, at: computed.append(plan.num_tokens))
    answer = solo.submit(prompt, greedy(1, prompt_logprobs=0, n=4))
    solo.run(answer)
    assert computed == [48, 3 * 16], "the others start from the blocks of the first"


def test_a_prompt_computed_here_was_queued_until_it_was_scheduled(llama: Path) -> None:
    solo = Solo(llama, max_num_batched_tokens=20)
    answer = solo.submit(PROMPT, greedy(2))
    solo.clock.advance(1.0)  # type: ignore[attr-defined]
    solo.step()
    solo.clock.advance(2.0)  # type: ignore[attr-defined]
    solo.run(answer)
    s = answer.stats
    assert (s.queue_ms, s.prefill_ms, s.decode_queue_ms, s.first_token_ms) == pytest.approx((1e3, 2e3, 0.0, 3e3))


def test_a_peer_that_cannot_be_used_has_transferred_nothing(solo: Solo) -> None:
    (prompt,) = prompts(53, (60,))
    solo.run(solo.submit(prompt, greedy(1)))
    answer = solo.submit(prompt, greedy(1), prefill=99)
    solo.run(answer)
    s = answer.stats
    assert (s.fallback, s.cached_tokens, s.transferred_tokens, s.computed_tokens) == ("peer not usable", 48, 0, 12)


def test_deadlines_of_ended_requests_are_not_kept(solo: Solo) -> None:
    for _ in range(300):
        solo.cancel(solo.submit(PROMPT, greedy(1), remaining_s=3600.0))
    solo.step()
    assert len(solo.decode.parts.requests._deadlines) < 150
    assert solo.decode.parts.requests.next_deadline == float("inf")


def test_a_choice_cancelled_before_its_prompt_passes_the_prompt_to_the_next(llama: Path) -> None:
    solo = Solo(llama, max_num_batched_tokens=8)
    params = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True, seed=9, n=3, prompt_logprobs=0)
    answer = solo.submit(PROMPT, params)
    solo.step()
    solo.cancel(answer, 0)
    solo.step()
    assert len(solo.decode.parts.scheduler.running) == 1, "the third waits for the prompt of the second"
    solo.run(answer)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs.token_logprobs) == len(PROMPT) - 1
    assert answer.stats.prompt_tokens == accounted(answer) == len(PROMPT)
    solo.check_idle()


def test_a_fresh_engine_has_counted_nothing(llama: Path) -> None:
    parts = Solo(llama).decode.parts
    assert (parts.supply.finished, parts.requests.tokens_out, parts.requests.finished) == (0, 0, {})
    assert parts.meter._step_tokens == []


def test_a_step_tells_that_it_is_under_way_at_each_layer(solo: Solo, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[None] = []
    monkeypatch.setattr(solo.decode.parts.runner, "on_progress", lambda: told.append(None))
    solo.submit(PROMPT, greedy(3))
    solo.run()
    assert len(told) == 3 * 3  # layers of the model, steps
