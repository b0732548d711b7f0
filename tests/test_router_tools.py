"""Tools and reasoning through the gateway: what clients get, whole and streamed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import parser_support
import pytest
import text_support
from parser_support import Answer
from router_support import MODEL, Cluster, Script, events, tokenizer, until
from tokenizers import Tokenizer as RawTokenizer
from tools_support import (
    ASK,
    CALL,
    PARIS,
    TEMPLATE,
    TEXT,
    TIME,
    TOOLS,
    WITH_TOOLS,
    asks,
    both,
    caller,
    cluster,
    streamed,
    whole,
    without_ids,
)

from common.text import Tokenizer
from common.text.parsers import ParserPlan
from common.types import ChoiceDelta, GenerationRequest, SamplingParams
from services.router.choice import ChoiceText

__all__ = ["caller"]


def reasoned(ids: Sequence[int]) -> int:
    """Tokens before and behind which the text so far is within reasoning that it began with."""
    texts = [tokenizer().decode(ids[:end], skip_special_tokens=False) for end in range(len(ids) + 1)]
    within = [text.lstrip().startswith("<think>") and "</think>" not in text for text in texts]
    return sum(before and behind for before, behind in pairwise(within))


async def test_calls_through_the_openai_client(caller: Cluster) -> None:
    async with caller.openai() as client:
        answer = await client.chat.completions.create(**WITH_TOOLS)
        stream = await client.chat.completions.create(**WITH_TOOLS, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment 🙂."
    assert choice.message.model_extra == {
        "reasoning": "It wants 你好.", "reasoning_content": "It wants 你好."
    }  # fmt: skip
    calls: Any = choice.message.tool_calls
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "get_weather", PARIS),
        ("function", "get_time", "{}"),
    ]
    assert all(c.id.startswith("call_") for c in calls)
    assert calls[0].id != calls[1].id
    assert chunks[-1].usage == answer.usage
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokenizer().encode(TEXT)) + 1
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens == reasoned(tokenizer().encode(TEXT)) > 5
    parts = [c for chunk in chunks[:-1] for c in chunk.choices[0].delta.tool_calls or ()]
    assert len([c for c in parts if c.id]) == 2
    assert len(parts) > 6  # arguments come in pieces
    assert "".join(c.function.arguments or "" for c in parts if c.function and c.index == 0) == PARIS
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "extra",
    [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}, {"stop": ["never"]}, {"min_tokens": 5, "stop": ["<"]}],
    ids=str,
)
async def test_calls_with_everything_else(caller: Cluster, extra: dict[str, Any]) -> None:
    answer, finish = await both(caller, **WITH_TOOLS, **extra)
    if "min_tokens" in extra:  # stop strings see the text of marks as well
        assert (answer, finish) == (Answer("", "It wants 你好.\n"), "stop")
        return
    assert finish == "tool_calls"
    assert answer == Answer(
        "One moment 🙂.", "It wants 你好.", [["", "get_weather", PARIS], ["", "get_time", "{}"]]
    )  # fmt: skip
    if "logprobs" in extra:
        one = (await caller.post("/v1/chat/completions", **WITH_TOOLS, **extra)).json()
        assert len(one["choices"][0]["logprobs"]["content"]) == one["usage"]["completion_tokens"]
        two = events((await caller.post("/v1/chat/completions", **WITH_TOOLS, **extra, stream=True)).text)
        found = [e for event in two for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
        assert found == one["choices"][0]["logprobs"]["content"]


async def test_each_of_n_choices_has_its_calls(tmp_path: Path) -> None:
    def script(request: GenerationRequest) -> Script:
        texts = [f'{i}<tool_call>{{"name": "f{i}"}}</tool_call>' for i in range(request.sampling.n)]
        return Script([tokenizer().encode(text) for text in texts])

    async with cluster(tmp_path, script, template=TEMPLATE) as made:
        answer = (await made.post("/v1/chat/completions", **WITH_TOOLS, n=3)).json()
        stream = (await made.post("/v1/chat/completions", **WITH_TOOLS, n=3, stream=True)).text
    ids = [call[0] for i in range(3) for call in whole(answer, i)[0].calls]
    assert len(set(ids)) == 3
    for i in range(3):
        want = Answer(str(i), "", [["", f"f{i}", "{}"]])
        assert without_ids(whole(answer, i)[0]) == without_ids(streamed(stream, i)[0]) == want


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_most_ends_the_answer(tmp_path: Path, stream: bool) -> None:
    async with asks(tmp_path, TEXT, delay_s=0.002) as made:
        body = WITH_TOOLS | {"parallel_tool_calls": False, "stream": stream}
        answer = await made.post("/v1/chat/completions", **body)
        found, finish = streamed(answer.text) if stream else whole(answer.json())
        assert (finish, [call[1:] for call in found.calls]) == ("tool_calls", [["get_weather", PARIS]])
        await until(lambda: made.worker.entries[1].cancelled_at > 0)
        if not stream:
            tokens = answer.json()["usage"]["completion_tokens"]
            assert tokens == len(tokenizer().encode(TEXT[: TEXT.index("}}") + 2]))


async def test_an_answer_cut_within_a_call(caller: Cluster) -> None:
    tokens = len(tokenizer().encode(TEXT[: TEXT.index("ris")]))
    answer, finish = await both(caller, **WITH_TOOLS, max_tokens=tokens)
    assert finish == "length"
    assert [call[1] for call in answer.calls] == ["get_weather"]
    assert PARIS.startswith(answer.calls[0][2])


async def test_a_stop_string_within_a_call_and_behind_one(caller: Cluster) -> None:
    answer, finish = await both(caller, **WITH_TOOLS, stop="aris")
    assert (answer.calls, finish) == ([["", "get_weather", '{"city": "P']], "stop")
    answer, finish = await both(caller, **WITH_TOOLS, stop="</tool_call>")
    assert (answer.calls, finish) == ([["", "get_weather", PARIS]], "tool_calls")


async def test_none_leaves_calls_in_the_text(caller: Cluster) -> None:
    answer, finish = await both(caller, **WITH_TOOLS, tool_choice="none")
    assert (answer, finish) == (Answer(f"One moment 🙂.\n{CALL}\n{TIME}", "It wants 你好."), "stop")
    prompt = tokenizer().decode(caller.worker.requests[0].prompt_token_ids)
    assert "get_weather" in prompt  # as in vLLM: the prompt, and so its cached KV, is that of other choices


async def test_reasoning_kept_in_or_left_out(caller: Cluster) -> None:
    raw = TEXT[: TEXT.index("\n" + CALL)]
    answer, _ = await both(caller, **ASK)
    assert (answer.reasoning, answer.content) == ("It wants 你好.", TEXT[TEXT.index("One") :])
    answer, _ = await both(caller, **ASK, include_reasoning=False)
    assert (answer.reasoning, answer.content) == ("", TEXT[TEXT.index("One") :])
    answer, _ = await both(caller, **ASK, separate_reasoning=False)
    assert (answer.reasoning, answer.content) == ("", TEXT)
    answer, finish = await both(caller, **WITH_TOOLS, separate_reasoning=False)
    assert (answer.content, len(answer.calls), finish) == (raw, 2, "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_counted_unless_it_is_content(caller: Cluster, stream: bool) -> None:
    async def counted(**extra: Any) -> int:
        body = ASK | extra | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
        answer = await caller.post("/v1/chat/completions", **body)
        usage = events(answer.text)[-1]["usage"] if stream else answer.json()["usage"]
        number: int = usage["completion_tokens_details"]["reasoning_tokens"]
        return number

    number = reasoned(tokenizer().encode(TEXT))
    assert await counted() == await counted(include_reasoning=False) == await counted(tools=TOOLS) == number
    assert await counted(n=3) == 3 * number
    assert await counted(separate_reasoning=False) == 0
    assert await counted(separate_reasoning=False, tools=TOOLS) == 0
    assert await counted(chat_template_kwargs={"enable_thinking": False}) == 0


def test_reasoning_is_counted_alike_however_tokens_come() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    texts = [golden["text"] for golden in parser_support.goldens() if golden["text"]]
    for _ in range(40):
        words = ["<think>", "</think>", "Hm 你好", "\n\n", "<", "🙂", rng.choice(texts)]
        ids = tokenizer().encode("".join(rng.choices(("<think>", "\n", ""), k=1) + rng.choices(words, k=6)))
        ids = ids[: rng.randint(1, len(ids))]
        parsing = parser_support.plan(rng.choice(("hermes", "deepseek_v4", "kimi_k2")))
        want = None
        for size, sampling in ((1, SamplingParams()), (3, SamplingParams()), (3, SamplingParams(logprobs=0))):
            text = ChoiceText(tokenizer(), sampling, None, [1], parsing=parsing)
            for at in range(0, len(ids), size):
                text.push(ChoiceDelta(choice=0, position=at, token_ids=tuple(ids[at : at + size])))
            want = text.num_reasoning_tokens if want is None else want
            assert text.num_reasoning_tokens == want, (seed, size)
        if "tool_call" not in tokenizer().decode(ids, skip_special_tokens=False):  # Kimi's ends reasoning
            assert want == reasoned(ids), seed


async def test_a_prompt_that_closes_reasoning(caller: Cluster) -> None:
    answer, _ = await both(caller, **ASK, chat_template_kwargs={"enable_thinking": False})
    assert (answer.reasoning, answer.content) == ("", TEXT)
    open_end = [*ASK["messages"], {"role": "assistant", "content": "<think>I sh"}]
    continued = {"model": MODEL, "messages": open_end, "continue_final_message": True}
    answer, _ = await both(caller, **continued)
    assert answer.reasoning == "It wants 你好."


async def test_only_reasoning_has_no_content(tmp_path: Path) -> None:
    async with asks(tmp_path, "<think>\nand so on") as made:
        message = (await made.post("/v1/chat/completions", **ASK)).json()["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning": "and so on",
        "reasoning_content": "and so on",
    }


KIMI_MARKS = ["section_begin", "section_end", "call_begin", "call_end", "call_argument_begin"]
KIMI_NAMES = [f"<|tool_{name.replace('section', 'calls_section')}|>" for name in KIMI_MARKS]


async def test_special_tokens_that_mark_calls_are_seen_and_others_are_not(tmp_path: Path) -> None:
    raw = RawTokenizer.from_str(text_support.byte_level().to_str())
    raw.add_special_tokens([*KIMI_NAMES, "<|other|>"])
    folder = text_support.write_checkpoint(tmp_path / "kimi", chat_template=TEMPLATE + "{# <|tool_call_begin|> #}")
    raw.save(str(folder / "tokenizer.json"))
    begin, end, call, call_end, arguments = KIMI_NAMES
    text = f"Well<|other|>.{begin}{call}functions.get_weather:3{arguments}{PARIS}{call_end}{end}"
    ids = [*Tokenizer(raw).encode(text), 2]

    def script(request: GenerationRequest) -> Script:
        return Script([ids], stop_token_id=2)

    async with cluster(tmp_path / "model", script, model_path=str(folder)) as made:
        answer = whole((await made.post("/v1/chat/completions", **WITH_TOOLS)).json())
        stream = streamed((await made.post("/v1/chat/completions", **WITH_TOOLS, stream=True)).text)
        plain = await made.post("/v1/chat/completions", **ASK)
    want = Answer("Well.", "", [["functions.get_weather:3", "get_weather", PARIS]])
    assert answer[0] == stream[0] == want
    assert plain.json()["choices"][0]["message"]["content"] == "Well.functions.get_weather:3" + PARIS


@pytest.mark.parametrize(
    "family", ["hermes", "qwen3_coder", "deepseek_v3", "deepseek_v4", "kimi_k2", "glm45", "llama3_json"]
)
async def test_random_answers_are_the_same_streamed_and_whole(family: str, tmp_path: Path) -> None:
    """With stop strings and logprobs or without, one token in a delta or several; calls cut and broken."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    texts = [golden["text"] for golden in parser_support.goldens() if golden["family"] == family and golden["text"]]

    def script(request: GenerationRequest) -> Script:
        own = random.Random(request.sampling.seed)
        outputs = [tokenizer().encode("".join(own.choices(texts, k=2))) for _ in range(request.sampling.n)]
        return Script([o[: own.randint(1, len(o))] for o in outputs], step_tokens=own.choice((1, 3, 50)))

    async with cluster(tmp_path / "model", script, tool_call_parser=family, reasoning_parser="qwen3") as made:
        for _ in range(6):
            extra = rng.choice(({}, {"logprobs": True}, {"stop": ["e", "never"], "min_tokens": 9}))
            body = WITH_TOOLS | extra | {"n": 2, "seed": rng.getrandbits(32), "parallel_tool_calls": rng.random() < 0.5}
            one = (await made.post("/v1/chat/completions", **body)).json()
            assert "choices" in one, (seed, body, one)
            two = (await made.post("/v1/chat/completions", **body, stream=True)).text
            for choice in range(2):
                answer, finish = whole(one, choice)
                streamed_answer, streamed_finish = streamed(two, choice)
                assert without_ids(streamed_answer) == without_ids(answer), seed
                assert streamed_finish == finish


def test_what_follows_reasoning_costs_no_parsing() -> None:
    plan = parser_support.plan("hermes")
    thinks = ParserPlan(reasoning=plan.reasoning)
    ids = tokenizer().encode("<think>Hm.</think>\n\nSo.")
    for parsing, ends_plain in ((None, True), (thinks, True), (plan, False)):
        text = ChoiceText(tokenizer(), SamplingParams(), None, [1], parsing=parsing)
        assert text.plain == (parsing is None)
        for position, token in enumerate(ids):
            text.push(ChoiceDelta(choice=0, position=position, token_ids=(token,)))
        assert text.plain == ends_plain
