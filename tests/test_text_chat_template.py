from __future__ import annotations

import contextlib
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import text_support

from common.errors import ConfigError, InvalidRequestError, UnsupportedError
from common.text import ChatTemplate, normalize_messages

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[Any] | None = None, **kwargs: Any) -> str:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}).render(messages or USER, **kwargs)


def test_chatml() -> None:
    text = render(text_support.CHAT_TEMPLATE, [{"role": "system", "content": "Be brief."}, *USER])
    assert text == "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(text_support.CHAT_TEMPLATE, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "Hi\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHib"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ tools is none }}{{ bos_token }}", "True<s>"),
        ("{{ messages[0]['content'].strip()[::-1] }}", "iH"),
        ("{% set d = {'items': 1, 'a': 2} %}{{ d['items'] }}{{ d.a }}{{ d.items() | list | length }}{{ d.b }}", "122"),
        ("{% for i in 'ab' %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }},{% endfor %}", "10True,21False,"),
        ("{% for i in 'ab' %}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.last }},{% endfor %}", "21False,10True,"),
        ("{% for i in 'ab' %}{{ loop.length }}{{ loop.previtem }}{{ loop.cycle(1, 2) }},{% endfor %}", "21,2a2,"),
        ("{{ messages[0][['role']] }}{{ messages[0]['update'] is defined }}", "False"),
    ],
)
def test_what_templates_rely_on(source: str, expected: str) -> None:
    assert render(source) == expected


def test_tools_and_variables_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render("{{ tools | tojson }}{{ enable_thinking }}", tools=tools, variables={"enable_thinking": False}) == (
        json.dumps(tools) + "False"
    )


def test_tool_call_arguments_are_objects() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    source = "{{ messages[1].tool_calls[0].function.arguments.x }}{{ messages[1].content == '' }}"
    assert render(source, messages) == "1True"


def test_continue_final_message_leaves_it_open() -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    text = render(text_support.CHAT_TEMPLATE, messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer is ")
    with pytest.raises(InvalidRequestError) as caught:
        render(text_support.CHAT_TEMPLATE, messages, continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    with pytest.raises(UnsupportedError):
        render("nothing of it", messages, add_generation_prompt=False, continue_final_message=True)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert normalize_messages([{"role": "user", "content": parts}])[0]["content"] == "one\ntwo"
    assert normalize_messages([{"role": "user", "content": []}])[0]["content"] == ""


def test_a_response_message_may_be_sent_back() -> None:
    message = {"role": "assistant", "content": "ok", "refusal": None, "annotations": [], "audio": None, "name": None}
    assert normalize_messages([message]) == [{"role": "assistant", "content": "ok"}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "usr", "content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([*USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "colour": "red"}], "messages[0].colour"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_bad_messages_name_their_place(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        normalize_messages(messages)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_refusal_of_the_template_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="failed on these messages"):
        render("{{ messages[7].content.x }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}{{ cycler.__init__.__globals__.os }}",
        "{{ messages[0].__class__ }}{{ messages[0]['__class__'] }}{{ {'__class__': 1}.__class__ }}",
        "{% for m in messages %}{{ loop.__init__ }}{{ loop._iterator }}{{ loop['__class__'] }}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert render(source) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0] %}{% endfor %}{% endfor %}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9 ** 999999999 }}",
    ],
)
def test_rendering_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.text.chat_template.MAX_RENDER_S", 0.2)
    start = time.monotonic()
    with pytest.raises(InvalidRequestError):
        render(source)
    assert time.monotonic() - start < 3
    with pytest.raises(InvalidRequestError, match="more than 10 characters"):
        render("{% for i in range(99) %}x{% endfor %}", max_chars=10)


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{% if messages[0].role == 'developer' %}dev{% endif %}", messages) == "dev"
    assert render("A developer asks. {% if messages[0].role == 'system' %}sys{% endif %}", messages).endswith("sys")
    tool = [{"role": "ipython", "content": "x"}]
    assert render("{% if messages[0]['role'] == 'ipython' %}py{% endif %}", tool) == "py"


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}, {}) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    loaded = ChatTemplate.load(tmp_path, {"chat_template": named}, {})
    assert loaded is not None
    assert loaded.source == "plain"
    (tmp_path / "chat_template.jinja").write_text("from file")
    loaded = ChatTemplate.load(tmp_path, {"chat_template": "from config"}, {})
    assert loaded is not None
    assert loaded.source == "from file"
    with pytest.raises(ConfigError, match="not a valid chat template"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize("layout", ["list", "files"])
def test_a_template_for_tools_renders_what_has_tools(tmp_path: Path, layout: str) -> None:
    plain, with_tools = "plain {{ messages[-1].content }}", "<tool_call> {{ tools[0].function.name }}"
    config: dict[str, Any] = {}
    if layout == "list":
        named = {"default": plain, "tool_use": with_tools, "rag": "never"}
        config["chat_template"] = [{"name": name, "template": source} for name, source in named.items()]
    else:
        (tmp_path / "chat_template.jinja").write_text(plain)
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    loaded = ChatTemplate.load(tmp_path, config, {})
    assert loaded is not None
    assert loaded.render(USER) == loaded.render(USER, tools=[]) == "plain Hi"
    assert loaded.render(USER, tools=[{"type": "function", "function": {"name": "f"}}]) == "<tool_call> f"
    assert "<tool_call>" in loaded.shown
    config["chat_template"] = [{"name": "tool_use", "template": "{% if %}"}]
    with pytest.raises(ConfigError, match=r"tool_use of .* is not a valid chat template"):
        ChatTemplate.load(tmp_path / "elsewhere", config, {})


CALLS = [
    {
        "id": "functions.get_weather:0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'},
    },
    {"id": "functions.get_time:1", "type": "function", "function": {"name": "get_time", "arguments": ""}},
]
CONVERSATION = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": [{"type": "text", "text": "18"}]},
    {"role": "tool", "tool_call_id": "functions.get_time:1", "content": None},
]

# What templates of each family do with calls: arguments printed, joined to text, gone through, or made JSON.
BY_FAMILY = {
    "Qwen3, Hermes": (
        "{%- if m.tool_calls %}{% for c in m.tool_calls %}{% if c.function %}{% set c = c.function %}{% endif %}"
        '<tool_call>\n{"name": "{{ c.name }}", "arguments": '
        "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}}\n</tool_call>"
        "{% endfor %}{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% endif %}",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
        "<tool_response>18</tool_response><tool_response></tool_response>",
    ),
    "Qwen3, as released first: reasoning may be none": (
        "{%- if m.role == 'assistant' %}{% if m.reasoning_content is not none and m.reasoning_content %}WRONG"
        "{% elif '</think>' in m.content %}WRONG{% endif %}{{ m.content + m.tool_calls[1].function.name }}{% endif %}",
        "get_time",
    ),
    "Qwen3, as mended by others: content may be none in one place": (
        "{%- set text = m.content if m.content is not none else '' %}"
        "{% if m.role == 'assistant' %}{{ text }}{{ m.content + m.tool_calls[1].function.name }}{% endif %}",
        "get_time",
    ),
    "Qwen3-Coder, Qwen3.5": (
        "{%- for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
        "{% for k, v in c.function.arguments | items %}"
        "<parameter={{ k }}>{{ v if v is string else v | tojson }}</parameter>{% endfor %}</function>{% endfor %}",
        "<function=get_weather><parameter=city>Köln</parameter></function><function=get_time></function>",
    ),
    "GLM-4.5, GLM-5": (
        "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{% set args = c.function.arguments %}"
        "{% for k, v in args.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}"
        "</tool_call>{% endfor %}",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Köln</arg_value></tool_call>"
        "<tool_call>get_time</tool_call>",
    ),
    "DeepSeek-V3, R1": (
        "{%- if m['role'] == 'assistant' and m['content'] is none %}{% for c in m['tool_calls'] %}"
        "{{ c['type'] + '|' + c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] + '\\n```' }}"
        "{% endfor %}{% endif %}{% if m['role'] == 'assistant' and m['content'] is not none %}WRONG{% endif %}",
        'function|get_weather\n```json\n{"city":"Köln"}\n```function|get_time\n```json\n{}\n```',
    ),
    "Kimi-K2": (
        "{%- for c in m.tool_calls or [] %}<|tool_call_begin|>{{ c['id'] }}<|tool_call_argument_begin|>"
        "{% if c['function']['arguments'] is string %}{{ c['function']['arguments'] }}{% else %}"
        "{{ c['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>{% endfor %}"
        "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}{% endif %}",
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Köln"}<|tool_call_end|>'
        "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "## Return of functions.get_weather:0\n18## Return of functions.get_time:1\n",
    ),
    "Llama 3": (
        "{%- for c in m.tool_calls or [] %}{% set c = c.function %}"
        '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}{% endfor %}'
        "{% if m.role == 'tool' or m.role == 'ipython' %}{{ m.content if m.content is string else m.content | tojson }}"
        "{% endif %}",
        '{"name": "get_weather", "parameters": {"city": "Köln"}}{"name": "get_time", "parameters": {}}18',
    ),
    "printed": (
        "{%- for c in m.tool_calls or [] %}{{ c.function.arguments }}{{ '' ~ c.function.arguments }}{% endfor %}",
        '{"city":"Köln"}{"city":"Köln"}{}{}',
    ),
}


@pytest.mark.parametrize("family", BY_FAMILY)
def test_calls_in_a_conversation(family: str) -> None:
    body, expected = BY_FAMILY[family]
    assert render("{% for m in messages %}" + body + "{% endfor %}", CONVERSATION) == expected


def test_reasoning_has_both_names() -> None:
    source = "{{ messages[1].reasoning }} {{ messages[1].reasoning_content }}"
    for name in ("reasoning", "reasoning_content"):
        assert render(source, [*USER, {"role": "assistant", "content": "x", name: "why"}]) == "why why"
