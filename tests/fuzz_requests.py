"""Random requests: right ones, nearly right ones and nonsense, from a seed. Plain data; `test_fuzz.py` sends them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """`leaves_s`: when the client hangs up; None: it stays to the end."""

    path: str
    raw: bytes
    headers: dict[str, str]
    leaves_s: float | None


WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "Zürich",
    "日本",
    "🙂",
    "\n",
    "<|im_end|>",
    "</s>",
    "<tool_call>",
    '{"a":',
    "\\",
    "\u0000",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
VALUES: dict[str, list[Any]] = {  # the first two of each are right, somewhere
    "temperature": [0, 0.7, 2.0, 100.0, -1, 1e308, "hot"],
    "top_p": [1.0, 0.5, 1e-9, 0, 2],
    "top_k": [-1, 0, 1, 5, 10**9, -7],
    "min_p": [0.0, 0.5, 1.0, 7],
    "n": [1, 2, 3, 0, 129, 10**12],
    "max_tokens": [1, 2, 5, 16, 0, -1, 10**15, 1.5],
    "min_tokens": [0, 1, 4, 99],
    "stop": [None, "a", ["a", "b"], ["x"] * 17, [""], "é", [1]],
    "stop_token_ids": [[], [1, 2], [-1], [10**9]],
    "ignore_eos": [True, False, "yes"],
    "seed": [0, 1, -5, 2**63, 2**64, "s"],
    "presence_penalty": [0, 1.5, -2, 3],
    "frequency_penalty": [0, 1.5, -2, 3],
    "repetition_penalty": [1.0, 1.3, 0, 9],
    "logit_bias": [{"5": 10}, {}, {"5": -100}, {"x": 1}, {"99999999": 1}],
    "logprobs": [None, True, False, 0, 3, 20, 21],
    "top_logprobs": [None, None, 0, 2, 20, 21],
    "echo": [True, False],
    "stream": [True, True, False, None, 1],
    "stream_options": [
        None,
        {"include_usage": True},
        {"include_usage": True, "continuous_usage_stats": True},
        {"x": 1},
    ],
    "truncate_prompt_tokens": [None, -1, 4, 0, 10**9],
    "cache_salt": ["", "tenant", 5],
    "priority": [0, -3, 7, 2**40],
    "user": ["somebody", None, 1],
    "tools": [None, [TOOL], [TOOL, TOOL], [], [{}], [{"type": "function"}], "tools"],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "get_weather"}}, "x", {}],
    "parallel_tool_calls": [True, False, None],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}},
        {"type": "json_schema"},
        {"type": "?"},
    ],
    "reasoning_effort": ["low", "high", 3],
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"messages": []}, []],
    "add_generation_prompt": [True, False],
    "continue_final_message": [False, False, True],
    "suffix": ["", "", "x"],
    "best_of": [1, 1, 2],
    "model": [None, None, "nobody", "", 7],
    "max_completion_tokens": [1, 4, -1],
    "timeout": [None, 30, 0.001, -1, 10**9],
    "prompt_logprobs": [None, 0, 2, 99],
}


class Fuzzer:
    def __init__(self, seed: int, model: str) -> None:
        self._random = random.Random(seed)
        self._model = model
        self._makers: list[tuple[str, Callable[[], Body]]] = [
            *[("/v1/chat/completions", self._chat)] * 4,
            *[("/v1/completions", self._completion)] * 3,
            ("/v1/responses", self._response),
            ("/v1/messages", self._message),
            ("/v1/messages/count_tokens", self._message),
            ("/v1/embeddings", lambda: {"model": self._model, "input": self._text()}),
            ("/tokenize", lambda: {"prompt": self._text()}),
            ("/detokenize", lambda: {"tokens": [self._random.randrange(300) for _ in range(5)]}),
            ("/v1/batches", lambda: {"input_file_id": "file-none", "endpoint": "/v1/chat/completions"}),
        ]

    def request(self) -> Request:
        rng = self._random
        path, make = rng.choice(self._makers)
        body = make()
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            name = rng.choice(list(VALUES))
            body[name] = rng.choice(VALUES[name] if rng.random() < 0.25 else VALUES[name][:2])
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            self._spoil(body)
        raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.04:
            raw = self._broken(raw)
        headers = {"content-type": rng.choice(("application/json", "application/json", "text/plain"))}
        if rng.random() < 0.1:
            headers["x-request-id"] = rng.choice(("mine-1", "x" * 400, "a b"))
        if rng.random() < 0.3:
            headers["x-nanodeploy-explain"] = headers["x-nanodeploy-timings"] = "1"
        return Request(path, raw, headers, rng.uniform(0.0, 0.2) if rng.random() < 0.1 else None)

    def _text(self) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.choice((1, 3, 10, 40))))

    def _content(self) -> Any:
        text = self._text()
        return self._random.choice(
            (text, text, [{"type": "text", "text": text}], None, "", [], [{"type": "image_url"}], 5)
        )

    def _chat(self) -> Body:
        rng = self._random
        roles = ("system", "user", "user", "assistant", "tool", "developer", "nobody")
        messages = [{"role": rng.choice(roles), "content": self._content()} for _ in range(rng.choice((0, 1, 2, 3)))]
        messages.append({"role": "user", "content": self._text()})
        return {"model": self._model, "messages": messages, "max_tokens": rng.choice((1, 3, 8))}

    def _completion(self) -> Body:
        rng = self._random
        prompts = (self._text(), [self._text(), self._text()], [5, 6, 7], [[5, 6], [7]], "", [], [-1], [10**9], [[]])
        return {"model": self._model, "prompt": rng.choice(prompts), "max_tokens": rng.choice((1, 3, 8))}

    def _response(self) -> Body:
        rng = self._random
        inputs = (
            self._text(),
            [{"role": "user", "content": self._text()}],
            [],
            [{"type": "item_reference", "id": "x"}],
        )
        body = {"model": self._model, "input": rng.choice(inputs), "max_output_tokens": rng.choice((1, 16, 0))}
        if rng.random() < 0.2:
            body["previous_response_id"] = "resp_none"
        return body

    def _message(self) -> Body:
        rng = self._random
        content = rng.choice((self._text(), [{"type": "text", "text": self._text()}], [{"type": "tool_result"}], []))
        return {
            "model": self._model,
            "max_tokens": rng.choice((1, 4)),
            "messages": [{"role": "user", "content": content}],
        }

    def _spoil(self, body: Body) -> None:
        """One thing that no client should send."""
        rng = self._random
        nonsense = (
            None,
            True,
            -1,
            0,
            10**30,
            1e-320,
            "",
            "x" * 5000,
            [],
            {},
            [[[[]]]],
            {"a": {"b": {}}},
            "\ud800",
            "\x00",
        )
        match rng.randrange(4):
            case 0:
                body[rng.choice(("unknown", "Temperature", "", "messages ", "__class__"))] = rng.choice(nonsense)
            case 1 if body:
                del body[rng.choice(list(body))]
            case 2 if body:
                body[rng.choice(list(body))] = rng.choice(nonsense)
            case _:
                deep: Any = "x"
                for _ in range(rng.choice((3, 60, 400))):
                    deep = [deep] if rng.random() < 0.5 else {"k": deep}
                body[rng.choice(("metadata", "messages", "prompt", "input", "tools"))] = deep

    def _broken(self, raw: bytes) -> bytes:
        rng = self._random
        at = rng.randrange(len(raw) + 1)
        return rng.choice(
            (raw[:at], raw[:at] + b"\xff" + raw[at:], b"", b"null", b"[]", b"[" * 3000, raw + raw, b"NaN")
        )
