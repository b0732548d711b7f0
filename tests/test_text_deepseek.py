"""DeepSeek's prompts: as its own encoders write them, and such that what the model writes in turn is read back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import parser_support
import pytest
from router_support import cluster, say, tokenizer

from common.errors import InvalidRequestError
from common.text.deepseek import EOS, DeepSeekFormat, checkpoint_format
from common.text.parsers import ParserPlan, Tools, call_format, reasoning_format

FOLDER = Path(__file__).parent / "data" / "prompts"
FAMILIES = ("deepseek_v32", "deepseek_v4")
USER: list[Any] = [{"role": "user", "content": "Hello"}]
CALLS: list[Any] = [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"x": "y"}'}},
]
ASKED: list[Any] = [*USER, {"role": "assistant", "content": None, "tool_calls": CALLS}]


def form(family: str, folder: Path = FOLDER) -> DeepSeekFormat:
    found = checkpoint_format(family, folder)
    assert found is not None
    return found


def render(family: str, messages: list[Any], *, tools: list[Any] | None = None, **variables: Any) -> str:
    return form(family).render(messages, tools=tools, variables=variables)


def result(call_id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["thinking", "chat"])
def test_a_conversation_as_the_encoder_of_the_checkpoint_writes_it(family: str, mode: str) -> None:
    given = json.loads((FOLDER / "conversation.json").read_text())
    prompt = render(family, given["messages"], tools=given["tools"], thinking=mode == "thinking")
    assert prompt == (FOLDER / f"{family}_{mode}.txt").read_text()


def test_documented_examples() -> None:
    # the model card of DeepSeek-V3.2
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
        {"role": "user", "content": "1+1=?"},
    ]
    assert render("deepseek_v32", messages, thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    # encoding/README.md of DeepSeek-V4
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 2+2?"},
    ]
    assert render("deepseek_v4", messages) == (
        "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>What is 2+2?<｜Assistant｜><think>"
    )


@pytest.mark.parametrize(
    ("variables", "v32", "v4"),
    [
        ({}, False, True),
        ({"thinking": True}, True, True),
        ({"enable_thinking": True}, True, True),
        ({"enable_thinking": True, "thinking": False}, True, True),
        ({"thinking": False}, False, False),
        ({"enable_thinking": False}, False, False),
        ({"reasoning_effort": "none"}, False, False),
        ({"thinking": True, "reasoning_effort": "none"}, False, False),
        ({"thinking": True, "reasoning_effort": "low"}, True, True),
        ({"thinking": None, "other": 1}, False, True),
    ],
    ids=str,
)
def test_when_the_model_reasons_as_in_vllm(variables: dict[str, Any], v32: bool, v4: bool) -> None:
    for family, reasons in zip(FAMILIES, (v32, v4), strict=True):
        start = "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>"
        assert render(family, USER, **variables) == start + ("<think>" if reasons else "</think>")


def test_efforts_are_those_of_the_release(tmp_path: Path) -> None:
    # encoding_dsv4.py: the first release has REASONING_EFFORT_MAX alone, those since July 2026 the three below
    encoder = tmp_path / "encoding" / "encoding_dsv4.py"
    encoder.parent.mkdir()
    encoder.write_text('REASONING_EFFORT_PROMPTS = {"low": ""}')
    starts = {"": "<｜User｜>", "absolute": "Reasoning Effort: Absolute maximum", "beyond": "Reasoning Effort: Beyond"}
    first = {"minimal": "", "low": "", "medium": "", "high": "", "xhigh": "absolute", "max": "absolute"}
    later = {"minimal": "", "low": "", "medium": "", "high": "absolute", "xhigh": "absolute", "max": "beyond"}
    for folder, efforts in ((FOLDER, first), (tmp_path, later)):
        made = form("deepseek_v4", folder)
        for effort, start in efforts.items():
            prompt = made.render(USER, variables={"reasoning_effort": effort})
            assert prompt.startswith("<｜begin▁of▁sentence｜>" + starts[start]), (effort, start)
            assert prompt.endswith("<｜User｜>Hello<｜Assistant｜><think>")
            silent = made.render(USER, variables={"reasoning_effort": effort, "thinking": False})
            assert silent == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>"
        with pytest.raises(InvalidRequestError, match="one of minimal, low, medium, high, xhigh, max") as caught:
            made.render(USER, variables={"reasoning_effort": "extreme"})
        assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize("family", FAMILIES)
def test_system_and_developer_messages(family: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    developer = [{"role": "developer", "content": "Be brief."}, *USER]
    system = [{"role": "system", "content": "Be brief."}, *USER]
    assert render(family, developer, tools=tools) == render(family, system, tools=tools)
    assert "Be brief.\n\n## Tools\n\n" in render(family, system, tools=tools)
    assert render(family, USER, tools=tools).startswith("<｜begin▁of▁sentence｜>\n\n## Tools\n\n")
    late = [*system, {"role": "assistant", "content": "Hi"}, {"role": "developer", "content": "In French."}, *USER]
    assert f"Hi{EOS}In French.<｜User｜>Hello" in render(family, late)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_in_the_order_of_their_calls(family: str) -> None:
    ordered = render(family, [*ASKED, result("a", "1"), result("b", "2")])
    assert ordered.index("1</") < ordered.index("2</")
    assert render(family, [*ASKED, result("b", "2"), result("a", "1")]) == ordered
    unnamed = [{"role": "function", "name": "f", "content": "2"}, {"role": "tool", "content": "1"}]
    swapped = render(family, [*ASKED, *unnamed])
    assert swapped.index("2</") < swapped.index("1</")


def test_v4_has_results_and_texts_in_one_turn() -> None:
    messages = [*ASKED, result("b", "2"), {"role": "user", "content": "Wait."}, result("a", "1"), *USER]
    assert render("deepseek_v4", messages, thinking=False).endswith(
        f"{EOS}<｜User｜><tool_result>1</tool_result>\n\nWait.\n\n<tool_result>2</tool_result>\n\nHello"
        "<｜Assistant｜></think>"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_generation_prompt(family: str) -> None:
    for messages in (USER, [*ASKED, result("a", "1"), result("b", "2")]):
        asks = render(family, messages)
        bare = form(family).render(messages, add_generation_prompt=False)
        mark = "<think>" if family == "deepseek_v4" else "</think>"
        before = "\n\n" if family == "deepseek_v32" and len(messages) > 1 else "<｜Assistant｜>"
        assert asks == bare + before + mark


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("answer", "thinks", "end"),
    [
        ({"content": "```py\n"}, True, "</think>```py\n"),
        ({"content": "```py\n"}, False, "</think>```py\n"),
        ({"content": "So", "reasoning_content": "Hm."}, True, "<think>Hm.</think>So"),
        ({"content": "So", "reasoning_content": "Hm."}, False, "</think>So"),
        ({"content": "<think>Hm"}, True, "<think>Hm"),
        ({"content": "<think>Hm"}, False, "<think>Hm"),
        ({"content": "<think>Hm.</think>So"}, True, "<think>Hm.</think>So"),
    ],
)
def test_an_answer_is_continued(family: str, answer: dict[str, Any], thinks: bool, end: str) -> None:
    messages = [*USER, {"role": "assistant", **answer}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    prompt = form(family).render(messages, variables={"thinking": thinks}, **options)
    assert prompt == f"<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>{end}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "latest_reminder", "content": "x"}], {}, "messages[0].role"),
        ([*USER, {"role": "user"}], {}, "messages[1].content"),
        (USER, {"continue_final_message": True}, "continue_final_message"),
        (USER, {"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        (ASKED, {"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        (USER, {"variables": {"thinking": "yes"}}, "chat_template_kwargs"),
        (USER, {"variables": {"enable_thinking": 1}}, "chat_template_kwargs"),
        (USER, {"max_chars": 20}, "messages"),
    ],
)
def test_what_is_refused(family: str, messages: list[Any], options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        form(family).render(messages, **options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([result("a", "1")], "messages[0]"),
        ([*USER, result("a", "1")], "messages[1]"),
        ([*ASKED, result("a", "1"), result("b", "2"), result("c", "3")], "messages[4]"),
        ([*ASKED, result("a", "1"), *USER], "messages[1].tool_calls"),
    ],
)
def test_v32_needs_one_result_for_each_call(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render("deepseek_v32", messages)
    assert caught.value.param == param
    assert param in caught.value.message


def test_other_checkpoints_without_a_template_have_no_format() -> None:
    assert checkpoint_format("llama", FOLDER) is None
    assert checkpoint_format("glm_moe_dsa", FOLDER) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_format_makes_the_model_write_is_read_back(family: str) -> None:
    """A turn of random texts and calls as it stands in a prompt, read as if the model had written it."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    made = form(family)
    calls, reasoning = call_format("auto", made.source, ""), reasoning_format("auto", made.source, "")
    assert calls is call_format(family, "", "")
    assert reasoning is not None
    texts = ["Es kostet 5 < 7 €", "你好 🙂\n\nzwei", '<b x="1">', "｜DSML｜", "", "[1, 2"]
    values = [*texts, " \n x\n", "true", "5", 5, -0.5, True, False, None, [1, {"a": "é"}], {"k": []}]
    anything: dict[str, Any] = {"type": ["string", "number", "boolean", "null", "array", "object"]}
    properties = dict.fromkeys("abcd", anything)
    functions = [{"name": name, "parameters": {"properties": properties}} for name in "fg"]
    tools = [{"type": "function", "function": function} for function in functions]
    for _ in range(100):
        thinks = rng.random() < 0.7
        prompt = made.render(USER, tools=tools, variables={"thinking": thinks})
        said: dict[str, Any] = {"content": rng.choice(texts), "reasoning_content": rng.choice(texts)}
        asked = [
            (rng.choice("fg"), {key: rng.choice(values) for key in rng.sample("abcd", rng.randint(0, 4))})
            for _ in range(rng.randint(0, 3))
        ]
        made_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in asked]
        messages = [*USER, {"role": "assistant", **said, "tool_calls": made_calls}]
        whole = made.render(messages, tools=tools, variables={"thinking": thinks})
        assert whole.startswith(prompt)
        written = whole.removeprefix(prompt).removesuffix(EOS)
        plan = ParserPlan(calls, Tools(tools), reasoning, reasoning.start(prompt))
        answer = parser_support.parse(plan, parser_support.cut(written, rng))
        assert answer.content == said["content"], (seed, written)
        assert answer.reasoning == (said["reasoning_content"] if thinks else ""), (seed, written)
        assert [(name, json.loads(text)) for _, name, text in answer.calls] == asked, (seed, written)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_checkpoint_without_a_template_chats(family: str, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}]
    start = render(family, USER, tools=tools, thinking=True)
    calls = render(family, ASKED, tools=tools, thinking=True).removeprefix(start + "</think>").removesuffix(EOS)
    options: dict[str, Any] = {"template": None, "architecture": family, "max_model_len": 4096}
    async with cluster(tmp_path / "model", say(f"Hm.</think>Well.{calls}"), **options) as made:
        body = {"messages": USER, "tools": tools, "chat_template_kwargs": {"thinking": True}}
        answer = await made.post("/v1/chat/completions", **body)
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Well.")
        asked = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert asked == [("f", "{}"), ("f", '{"x": "y"}')]
        prompt = made.worker.requests[-1].prompt_token_ids
        assert tokenizer().decode(prompt, skip_special_tokens=False) == start
        strange = await made.post("/v1/chat/completions", messages=USER, chat_template_kwargs={"thinking": "yes"})
        assert (strange.status_code, strange.json()["error"]["param"]) == (400, "chat_template_kwargs")
