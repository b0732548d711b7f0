"""Steps planned while another is under way: the same tokens, and nothing held by a sequence that has ended."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_support import PEER, READER, Answer, Pair, Solo, greedy, hybrid, llama, prompts, windowed

from common.engine.batch import Batch
from common.engine.messages import PeerEvent, ReaderEvent
from common.engine.runner import Pending
from common.kvcache.layout import FULL_GROUP
from common.kvtransfer.memory import Fault
from common.kvtransfer.orders import DropOrder, OrderExtent, OrderFailed, OrderFinished, PlaceOrder
from common.types import FinishReason, SamplingParams
from common.types.prefix import pack_tokens

__all__ = ["hybrid", "llama", "windowed"]

OVERLAP = {"async_scheduling": "on"}


def mixed(seed: int) -> list[SamplingParams]:
    """Requests of many kinds: greedy and drawn, with penalties, logprobs, stops and choices."""
    rng = random.Random(seed)
    out = []
    for i in range(12):
        kind: dict[str, Any] = rng.choice(
            [
                {},
                {"temperature": 0.9},
                {"temperature": 1.1, "top_k": 20, "top_p": 0.9},
                {"temperature": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
                {"logprobs": 2},
                {"stop_token_ids": tuple(range(4, 40))},
                {"n": 2, "temperature": 1.0},
            ]
        )
        out.append(greedy(rng.randrange(1, 24), **kind | {"seed": i}))
    return out


def answers(engine: Solo, seed: int) -> list[dict[int, list[int]]]:
    params = mixed(seed)
    texts = prompts(seed, [random.Random(seed + i).randrange(1, 60) for i in range(len(params))])
    got = [engine.submit(text, one) for text, one in zip(texts, params, strict=True)]
    engine.run()
    engine.check_idle()
    assert all(a.failure is None for a in got)
    return [a.tokens for a in got]


@pytest.mark.parametrize("model", ["llama", "windowed", "hybrid"])
@pytest.mark.parametrize("few_blocks", [False, True])
def test_tokens_do_not_depend_on_overlap(model: str, few_blocks: bool, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    options: dict[str, Any] = {"max_num_batched_tokens": 24}
    if few_blocks:
        options |= {"max_model_len": 128, "kv_cache_memory_bytes": 192 << 10, "max_num_seqs": 8}
    seed = 11 if few_blocks else 12
    assert answers(Solo(folder, **OVERLAP, **options), seed) == answers(Solo(folder, **options), seed)


def test_a_handed_over_prompt_goes_on_with_overlap(llama: Path) -> None:
    pair = Pair(llama, prefill=OVERLAP | {"max_num_batched_tokens": 16}, **OVERLAP)
    assert answers(pair, 13) == answers(Solo(llama), 13)


def test_a_step_that_fails_gives_its_blocks_back_when_the_device_is_at_rest(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of it was launched before it failed still writes to them, and a read may be next."""
    solo = Solo(llama, **OVERLAP)
    runner, cache, seen = solo.decode.parts.runner, solo.decode.parts.cache, list[str]()

    def fail(pending: Pending) -> None:
        raise RuntimeError("out of memory")

    close = cache.close
    with monkeypatch.context() as patch:
        patch.setattr(runner, "sample", fail)
        patch.setattr(runner, "wait", lambda: seen.append("wait"))
        patch.setattr(cache, "close", lambda seq_id: (seen.append("close"), close(seq_id)))
        answer = solo.submit(prompts(18, [40])[0], greedy(5))
        solo.step()
    assert answer.failure is not None
    assert seen[:2] == ["wait", "close"]
    solo.check_idle()


def test_what_runs_past_a_stop_is_never_shown(llama: Path) -> None:
    (prompt,) = prompts(14, [20])
    plain = Solo(llama)
    whole = plain.submit(prompt, greedy(12))
    plain.run()
    stop = whole.tokens[0][5]
    solo = Solo(llama, **OVERLAP)
    answer = solo.submit(prompt, greedy(12, stop_token_ids=(stop,)))
    solo.run()
    end = whole.tokens[0].index(stop) + 1
    assert answer.tokens[0] == whole.tokens[0][:end]
    assert answer.finish[0] is FinishReason.STOP
    solo.check_idle()


@pytest.mark.parametrize("model", ["llama", "hybrid"])
def test_a_step_is_launched_before_the_one_before_is_collected(model: str, request: pytest.FixtureRequest) -> None:
    """But for one that begins a state, or leaves one to be cached: here the first 16 tokens."""
    solo = Solo(request.getfixturevalue(model), **OVERLAP)
    order: list[str] = []
    runner = solo.decode.parts.runner
    forward, collect = runner.forward, runner.collect
    runner.forward = lambda batch: (order.append("launch"), forward(batch))[1]  # type: ignore[method-assign]
    runner.collect = lambda pending: (order.append("collect"), collect(pending))[1]  # type: ignore[method-assign]
    solo.submit(prompts(15, [20])[0], greedy(4))
    solo.run()
    alone = ["launch", "collect"] if model == "hybrid" else []
    assert order == [*alone, "launch", "launch", "collect", "launch", "collect", "launch", "collect", "collect"]


def test_cancelled_under_way_frees_its_blocks_when_the_step_is_over(llama: Path) -> None:
    solo = Solo(llama, **OVERLAP)
    (prompt,) = prompts(16, [40])
    answer = solo.submit(prompt, greedy(50))
    for _ in range(5):
        solo.step()
    solo.cancel(answer)
    solo.decode.parts.cache.check()
    assert not _is_idle(solo)  # the step under way still writes
    solo.step()
    solo.check_idle()


def _is_idle(solo: Solo) -> bool:
    try:
        solo.decode.parts.cache.check_idle()
    except AssertionError:
        return False
    return True


def test_messages_are_handled_while_the_device_computes(llama: Path) -> None:
    pair = Pair(llama, prefill=OVERLAP, **OVERLAP)
    seen: list[object] = []
    runner, engine = pair.decode.parts.runner, pair.decode.engine
    runner.is_done = lambda pending: seen.count(pending) >= 3 or seen.append(pending) is not None  # type: ignore[method-assign]
    long, short, other = prompts(17, [30, 12, 50])
    first = pair.submit(long, greedy(30))
    later: list[Any] = []

    def listen() -> None:
        if len(seen) >= 20 and not later:
            later.append(pair.submit(short, greedy(5)))
        if len(seen) >= 23 and len(later) == 1:
            later.append(pair.submit(other, greedy(40)))
        if len(seen) >= 30 and not later[1].ended:
            pair.cancel(later[1])

    engine.while_waiting = listen
    pair.run(first)
    pair.run(later[0])
    plain = Solo(llama)
    expected = [plain.submit(long, greedy(30)), plain.submit(short, greedy(5))]
    plain.run()
    assert [first.tokens, later[0].tokens] == [e.tokens for e in expected]
    assert later[1].finish[0] is FinishReason.CANCELLED
    engine.while_waiting = None
    pair.check_idle()


def test_an_engine_does_not_sleep_when_the_last_step_gave_room(llama: Path) -> None:
    """What the step under way frees, and what comes while it is awaited, is seen by the next plan."""
    solo = Solo(llama, max_num_seqs=1, **OVERLAP)
    engine, runner = solo.decode.engine, solo.decode.parts.runner
    first, second, third = prompts(18, [20, 30, 10])
    answers = [solo.submit(first, greedy(3)), solo.submit(second, greedy(3))]
    waits: list[object] = []
    runner.is_done = lambda pending: pending in waits or waits.append(pending) is not None  # type: ignore[method-assign]

    def listen() -> None:
        if len(answers) == 2 and len(answers[1].tokens.get(0, ())) == 2:  # its last token is awaited
            answers.append(solo.submit(third, greedy(3)))

    engine.while_waiting = listen
    for _ in range(20):
        if len(answers) == 3 and all(a.ended for a in answers):
            break
        assert engine.has_work
        solo.step()
    assert [len(a.tokens[0]) for a in answers] == [3, 3, 3]
    engine.while_waiting = None
    solo.check_idle()


def test_an_interrupted_wait_leaves_nothing_behind(llama: Path) -> None:
    """Ctrl-C in a notebook: the next call has all blocks."""
    solo = Solo(llama, **OVERLAP)
    runner = solo.decode.parts.runner
    answers = [solo.submit(prompt, greedy(20)) for prompt in prompts(19, [20, 30])]
    for _ in range(4):
        solo.step()
    collect = runner.collect

    def interrupted(pending: Any) -> Any:
        raise KeyboardInterrupt

    runner.collect = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        solo.step()
    runner.collect = collect  # type: ignore[method-assign]
    for answer in answers:
        solo.cancel(answer)
    solo.decode.engine.settle()
    solo.check_idle()


def test_an_order_that_was_dropped_does_not_fail_with_its_step(llama: Path) -> None:
    pair = Pair(llama, prefill=OVERLAP | {"max_num_batched_tokens": 16})
    engine, runner = pair.prefill.engine, pair.prefill.parts.runner
    (prompt,) = prompts(20, [60])
    engine.handle(PlaceOrder(READER, 1, "r", pack_tokens(prompt), 0, "", "", (), 0, 0.0))
    engine.step()
    collect = runner.collect

    def fails(pending: Any) -> Any:
        raise RuntimeError("made up")

    runner.collect = fails  # type: ignore[method-assign]
    engine.handle(DropOrder(READER, 1))
    engine.step()
    runner.collect = collect  # type: ignore[method-assign]
    events = [m.event for m in engine.drain() if isinstance(m, ReaderEvent)]
    assert not any(isinstance(e, OrderFailed) for e in events)
    pair.check_idle()


def test_a_first_token_waits_for_no_step(llama: Path) -> None:
    """The head of a prompt that was handed over is computed beside the step that is awaited."""
    pair = Pair(llama, **OVERLAP)
    long, short = prompts(21, [20, 30])
    expected = Solo(llama)
    whole = expected.submit(short, greedy(6))
    expected.run()
    other = pair.submit(long, greedy(60), prefill=0)
    for _ in range(5):
        pair.step()
    engine, runner = pair.decode.engine, pair.decode.parts.runner
    steps = runner.forward
    launched: list[Pending] = []
    runner.forward = lambda batch: (launched.append(steps(batch)), launched[-1])[1]  # type: ignore[method-assign]
    answer = pair.submit(short, greedy(6))
    tokens_before = len(other.tokens[0])

    def listen() -> None:
        """The step goes on until the token is there."""
        pair.prefill.engine.step()
        for message in pair.prefill.engine.drain():
            if isinstance(message, ReaderEvent):
                engine.handle(PeerEvent(PEER, message.event))
        for message in engine.drain():
            pair.on_decode(message)

    engine.while_waiting = listen
    runner.is_done = lambda pending: pending not in launched or bool(answer.tokens)  # type: ignore[method-assign]
    pair.step()
    pair.step()
    assert answer.tokens[0] == whole.tokens[0][:1]
    assert len(other.tokens[0]) - tokens_before <= 2
    engine.while_waiting = None
    pair.run()
    assert answer.tokens == whole.tokens
    pair.check_idle()


def early(pair: Pair, prompt: tuple[int, ...]) -> Answer:
    """A hand-off whose hidden row is there, whose token is drawn, and whose KV is on its way."""
    pair.network.held = True
    answer = pair.submit(prompt, greedy(8))
    scheduler = pair.decode.parts.scheduler
    for _ in range(20):
        pair.step()
        if pair.network.num_waiting == 2:
            break
    pair.network.step(0)  # the tail leads
    drawn: list[Batch] = []
    runner = pair.decode.parts.runner
    draw = runner.draw_beside  # type: ignore[attr-defined]
    runner.draw_beside = lambda batch, masks: (drawn.append(batch), draw(batch, masks))[1]  # type: ignore[attr-defined]
    for _ in range(3):
        pair.step()
    assert len(drawn) == 1
    (seq,) = scheduler.remote.values()
    assert seq.first_under_way
    assert not answer.tokens, "its KV is not verified"
    assert not pair.decode.engine.has_work, "nothing is to be computed or brought"
    return answer


@pytest.mark.parametrize("end", ["done", "owner killed", "session lost", "cancelled", "bytes changed"])
def test_a_first_token_is_drawn_while_the_rest_is_on_its_way(end: str, llama: Path) -> None:
    """And forgotten if the hand-off fails: then it is drawn again from what is computed here."""
    (prompt,) = prompts(25, [70])
    solo = Solo(llama)
    whole = solo.submit(prompt, greedy(8))
    solo.run()
    pair = Pair(llama, **OVERLAP)
    if end == "bytes changed":
        pair.network.fault_for = lambda _, pieces: Fault.CORRUPT if pieces[0].group == FULL_GROUP else Fault.NONE
    answer = early(pair, prompt)
    match end:
        case "owner killed":
            pair.kill_prefill()
        case "session lost":
            pair.lose_session()
        case "cancelled":
            pair.cancel(answer)
    pair.network.held = False
    pair.network.advance()
    pair.run()
    if end == "cancelled":
        assert answer.finish[0] is FinishReason.CANCELLED
        assert not answer.tokens[0]
    else:
        assert answer.tokens == whole.tokens
    demand = pair.decode.parts.demand
    assert sum(demand.fallbacks.values()) == (end not in ("done", "cancelled"))
    assert not demand.tails
    pair.check_idle()


@pytest.mark.parametrize("seed", range(6))
def test_first_tokens_are_right_whatever_comes_first_or_fails(seed: int, llama: Path) -> None:
    """Reads end in any order, some wrongly, while requests are cancelled; few blocks, so that others take them."""
    rng = random.Random(seed)
    params = mixed(seed)
    texts = prompts(seed, [rng.randrange(20, 60) for _ in params])
    solo = Solo(llama)
    whole = [solo.submit(text, one) for text, one in zip(texts, params, strict=True)]
    solo.run()
    few = {"max_model_len": 128, "kv_cache_memory_bytes": 192 << 10, "max_num_seqs": 8}
    pair = Pair(llama, **OVERLAP, **few)
    pair.network.held = True
    pair.network.fault_for = lambda *_: rng.choice([Fault.NONE] * 12 + [Fault.FAIL, Fault.CORRUPT])
    got, cancelled = [], set[int]()
    drawn_early = 0
    for _ in range(20_000):
        if len(got) < len(params) and rng.random() < 0.3:
            got.append(pair.submit(texts[len(got)], params[len(got)]))
        pair.step()
        drawn_early += any(s.first_under_way for s in pair.decode.parts.scheduler.remote.values())
        if rng.random() < 0.2:
            pair.network.step(rng.randrange(8))
        if got and rng.random() < 0.01:
            choice = rng.randrange(len(got))
            cancelled.add(choice)
            pair.cancel(got[choice])
        if len(got) == len(params) and all(a.ended for a in got):
            break
    else:
        raise AssertionError("requests that never end")
    assert drawn_early
    for number, (answer, expected) in enumerate(zip(got, whole, strict=True)):
        if number not in cancelled:
            assert answer.tokens == expected.tokens
    pair.network.held = False
    pair.network.advance()
    pair.check_idle()


def test_a_first_token_leaves_before_the_next_step_is_launched(llama: Path) -> None:
    pair = Pair(llama, **OVERLAP)
    engine, runner = pair.decode.engine, pair.decode.parts.runner
    happened: list[str] = []
    forward = runner.forward

    def launch(batch: Batch) -> Pending:
        happened.append("step")
        return forward(batch)

    def send() -> None:
        happened.append("token")
        for message in engine.drain():
            pair.on_decode(message)
        assert len(answer.tokens[0]) == 1

    runner.forward, engine.on_awaited = launch, send  # type: ignore[method-assign]
    answer = pair.submit(prompts(24, [30])[0], greedy(6))
    pair.run()
    assert happened[:2] == ["token", "step"]
    assert happened.count("token") == 1
    pair.check_idle()


def test_kv_is_announced_as_soon_as_its_step_is_collected(llama: Path) -> None:
    """What a step brings leaves at its end; a reader that waits does not wait for what else the step does."""
    pair = Pair(llama, **OVERLAP)
    engine = pair.prefill.engine
    at_once: list[type] = []

    def send() -> None:
        for message in engine.drain():
            assert isinstance(message, ReaderEvent)
            at_once.append(type(message.event))
            pair.decode.engine.handle(PeerEvent(PEER, message.event))

    engine.on_awaited = send
    answer = pair.submit(prompts(24, [30])[0], greedy(6))
    pair.run()
    assert at_once[-3:] == [OrderExtent, OrderExtent, OrderFinished]
    assert not any(isinstance(event, OrderExtent | OrderFinished) for event in pair.events)
    assert len(answer.tokens[0]) == 6
    pair.check_idle()


def test_what_arrives_is_launched_while_a_step_is_awaited(llama: Path) -> None:
    """With nothing behind the step the device would stand still until it is collected."""
    solo = Solo(llama, **OVERLAP)
    engine, runner = solo.decode.engine, solo.decode.parts.runner
    first, second = prompts(22, [20, 30])
    forward = runner.forward
    launched: list[Pending] = []
    answers = [solo.submit(first, greedy(1))]

    def launch(batch: Batch) -> Pending:
        launched.append(forward(batch))
        return launched[-1]

    def listen() -> None:
        if len(answers) == 1:
            answers.append(solo.submit(second, greedy(3)))

    runner.forward = launch  # type: ignore[method-assign]
    runner.is_done = lambda pending: pending is not launched[0] or len(launched) > 1  # type: ignore[method-assign]
    engine.while_waiting = listen
    solo.step()
    assert len(launched) == 1
    solo.step()
    assert len(launched) == 2
    assert answers[0].ended
    solo.run()
    plain = Solo(llama)
    expected = [plain.submit(first, greedy(1)), plain.submit(second, greedy(3))]
    plain.run()
    assert [a.tokens for a in answers] == [e.tokens for e in expected]
    engine.while_waiting = None
    solo.check_idle()
