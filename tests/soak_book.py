"""What the soak asks and what the right answers are: those of an offline run of the same model, made beforehand.

Prompts are short, long (several chunks) and such with a beginning in common. Answers are greedy, or sampled with a
seed and n > 1, whole or cut at a stop string; either way they are a function of the question alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodeploy import LLM, SamplingParams
from services.router.replies import CompletionLogprobs

Ids = tuple[int, ...]
ENGINE: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_threads": 1}


@dataclass(frozen=True)
class Choice:
    text: str
    tokens: Ids
    finish: str


@dataclass(frozen=True)
class Question:
    """`body` is that of a request but for model and stream; `chat` says which endpoint it is for."""

    kind: str
    body: dict[str, Any]
    prompt_tokens: int
    right: tuple[Choice, ...]
    chat: bool = False


@dataclass(frozen=True)
class BadQuestion:
    """Sent as it is; the answer must be `status` with an error that tells more than its type."""

    content: bytes
    status: int


@dataclass(frozen=True)
class Book:
    questions: tuple[Question, ...]
    names: dict[str, int]  # of tokens, as logprobs show them

    def draw(self, rng: random.Random) -> Question:
        return rng.choice(self.questions)


def bad_questions(model: str) -> tuple[BadQuestion, ...]:
    good = f'"model": "{model}", "prompt": "x"'
    bodies = (
        (b"{", 400),
        (b"[1, 2]", 400),
        (b"\xff\xfe not even text", 400),
        (b'{"model": "nobody", "prompt": "x"}', 404),
        (b"{%s}" % good.replace('"x"', '{"a": 1}').encode(), 400),
        (b'{%s, "temprature": 1}' % good.encode(), 400),
        (b'{%s, "temperature": -1}' % good.encode(), 400),
        (b'{%s, "max_tokens": "ten"}' % good.encode(), 400),
        (b'{%s, "n": 0}' % good.encode(), 400),
        (b'{%s, "logit_bias": {"100000": 1}}' % good.encode(), 400),
        (f'{{"model": "{model}", "prompt": [{"5, " * 600}5]}}'.encode(), 400),
        (f'{{"model": "{model}", "prompt": [100000]}}'.encode(), 400),
    )
    return tuple(BadQuestion(content, status) for content, status in bodies)


def write_book(folder: Path, seed: int) -> Book:
    """All questions with their answers. The offline engine is gone when this returns."""
    rng = random.Random(seed)
    with LLM(folder, kv_cache_memory_bytes=32 << 20, **ENGINE) as llm:
        assert llm.tokenizer is not None
        size = llm.tokenizer.raw.get_vocab_size()
        drafts = [*_plain(rng, size), *_sampled(rng, size), *_stopped(rng, size, llm), *_chats(rng, llm)]
        params = [SamplingParams(**_offline(body)) for _, _, body, _ in drafts]
        answers = llm.generate([ids for _, ids, _, _ in drafts], params)
        names = {CompletionLogprobs._name(llm.tokenizer, token): token for token in range(size)}
    questions = []
    for (kind, ids, body, chat), answer in zip(drafts, answers, strict=True):
        right = tuple(Choice(o.text, tuple(o.token_ids), o.finish_reason or "") for o in answer.outputs)
        asked = body if chat else {"prompt": list(ids), **body}
        questions.append(Question(kind, asked, len(ids), right, chat))
    return Book(tuple(questions), names)


Draft = tuple[str, Ids, dict[str, Any], bool]


def _ids(rng: random.Random, size: int, count: int) -> Ids:
    return tuple(rng.randrange(4, size) for _ in range(count))


def _plain(rng: random.Random, size: int) -> list[Draft]:
    drafts: list[Draft] = []
    for _ in range(16):
        body = {"temperature": 0, "max_tokens": rng.randint(1, 40), "ignore_eos": rng.random() < 0.5, "logprobs": 0}
        drafts.append(("short", _ids(rng, size, rng.randint(2, 30)), body, False))
    for _ in range(12):
        body = {"temperature": 0, "max_tokens": rng.randint(4, 100), "ignore_eos": True, "logprobs": 0}
        drafts.append(("long", _ids(rng, size, rng.randint(150, 400)), body, False))
    for _ in range(3):
        start = _ids(rng, size, rng.randint(60, 200))
        for _ in range(5):
            body = {"temperature": 0, "max_tokens": rng.randint(2, 24), "ignore_eos": True, "logprobs": 0}
            drafts.append(("shared", start + _ids(rng, size, rng.randint(1, 60)), body, False))
    return drafts


def _sampled(rng: random.Random, size: int) -> list[Draft]:
    return [
        (
            "sampled",
            _ids(rng, size, rng.randint(10, 150)),
            {
                "temperature": 0.9,
                "top_p": 0.95,
                "seed": rng.randrange(2**32),
                "n": rng.randint(2, 4),
                "max_tokens": rng.randint(4, 24),
                "ignore_eos": True,
            },
            False,
        )
        for _ in range(10)
    ]


def _stopped(rng: random.Random, size: int, llm: LLM) -> list[Draft]:
    """Stop strings are taken out of the middle of what the model says."""
    prompts = [_ids(rng, size, rng.randint(5, 120)) for _ in range(10)]
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    drafts: list[Draft] = []
    for prompt, answer in zip(prompts, llm.generate(prompts, greedy), strict=True):
        text = answer.outputs[0].text
        at = rng.randint(len(text) // 3, len(text) // 2)
        body = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "stop": [text[at : at + 4], "never said"]}
        drafts.append(("stopped", prompt, body, False))
    return drafts


def _chats(rng: random.Random, llm: LLM) -> list[Draft]:
    assert llm.tokenizer is not None
    assert llm.tokenizer.chat_template is not None
    drafts: list[Draft] = []
    for number in range(8):
        messages = [{"role": "user", "content": f"Question {number}: " + "why is the sky blue? " * rng.randint(1, 8)}]
        ids = tuple(llm.tokenizer.encode(llm.tokenizer.chat_template.render(messages), add_special_tokens=False))
        body = {"temperature": 0, "max_tokens": rng.randint(4, 32), "messages": messages}
        drafts.append(("chat", ids, body, True))
    return drafts


def _offline(body: dict[str, Any]) -> dict[str, Any]:
    """A request's fields as those of `SamplingParams`."""
    fields = {name: value for name, value in body.items() if name != "messages"}
    return fields | {"temperature": float(fields["temperature"]), "stop": tuple(fields.get("stop", ()))}
