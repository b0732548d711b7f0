"""A trace of chats with shared prefixes, and the units it is counted in: a token is a byte of the rendered chat.

So the text that other routers hand on and the token ids that ours makes of it are the same tokens. Simulated workers
(`services.simulator.machine`) draw token 0 only: a byte's id is the byte xor "x", and every answer is a row of x.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.types.prefix import UNIT, extend_chain

BLOCK = 64  # tokens of a cached block
ANSWER = "x"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}[assistant]{{ '\\n' }}"
_IDS = bytes(byte ^ ord(ANSWER) for byte in range(256))
_LETTERS = string.ascii_lowercase + " " * 6

Messages = tuple[tuple[str, str], ...]  # role, content


@dataclass(frozen=True, slots=True)
class Request:
    """`at_s` from the trace's start."""

    at_s: float
    messages: Messages
    max_tokens: int

    @property
    def body(self) -> bytes:
        messages = [{"role": role, "content": content} for role, content in self.messages]
        body = {"model": "bench", "messages": messages, "max_tokens": self.max_tokens, "stream": True}
        return json.dumps(body, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Mixture:
    """Poisson arrivals for `seconds`: `hot_share` of them are one system prompt of `hot_tokens` with a question of
    their own, the others are turns of conversations.

    A conversation begins with one of `systems` system prompts (the first is the most popular, by Zipf's law), has
    `most_turns` questions, and asks the next one at least `think_s` after the one before. Lengths in tokens.
    """

    rate: float
    seconds: float
    seed: int = 0
    hot_share: float = 0.0
    hot_tokens: int = 2048
    systems: int = 8
    system_tokens: int = 1024
    question_tokens: tuple[int, int] = (150, 650)
    most_turns: int = 6
    think_s: float = 2.0
    output_tokens: int = 24

    def requests(self) -> list[Request]:
        rng = random.Random(self.seed)
        hot = _text(rng, self.hot_tokens)
        systems = [_text(rng, self.system_tokens) for _ in range(self.systems)]
        popular = [1 / (i + 1) for i in range(self.systems)]
        resting: list[tuple[float, Messages]] = []  # (may go on at, what was said)
        found: list[Request] = []
        at_s = rng.expovariate(self.rate)
        while at_s < self.seconds:
            question = ("user", _text(rng, rng.randint(*self.question_tokens)))
            if rng.random() < self.hot_share:
                messages: Messages = (("system", hot), question)
            else:
                ready = [i for i, (from_s, _) in enumerate(resting) if from_s <= at_s]
                if ready and rng.random() * self.most_turns >= 1.0:
                    messages = (*resting.pop(rng.choice(ready))[1], question)
                else:
                    messages = (("system", rng.choices(systems, popular)[0]), question)
                if len(messages) < 2 * self.most_turns:
                    answered = (*messages, ("assistant", ANSWER * self.output_tokens))
                    resting.append((at_s + self.think_s, answered))
            found.append(Request(at_s, messages, self.output_tokens))
            at_s += rng.expovariate(self.rate)
        return found


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(_LETTERS, k=length))


# -- units ---------------------------------------------------------------------------------------------


def token_ids(messages: Sequence[tuple[str, str]]) -> list[int]:
    """Of the prompt, as the router's tokenizer and `TEMPLATE` make them."""
    text = "".join(f"[{role}]\n{content}\n" for role, content in messages) + "[assistant]\n"
    return list(text.encode().translate(_IDS))


def write_tokenizer(folder: Path) -> None:
    """A checkpoint's tokenizer files: 256 tokens of a byte each, and an end of sequence that no text has."""
    letters = _byte_letters()
    vocab = {letters[byte]: _IDS[byte] for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<eos>", special=True)])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<eos>"}))


def _byte_letters() -> list[str]:
    """Byte-level BPE's letter for each byte: itself if it can be seen, else the next one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


@dataclass(frozen=True)
class Best:
    """What one cache that forgets nothing would have of a trace, if each answer were there before the next request."""

    prompt_tokens: int
    cached_tokens: int

    @staticmethod
    def of(requests: Sequence[Request]) -> Best:
        held: set[bytes] = set()
        stride, prompt, cached = BLOCK // UNIT, 0, 0
        for request in requests:
            ids = token_ids(request.messages)
            chain = [b"\0" * 16]
            extend_chain(chain, [*ids, *([0] * (request.max_tokens - 1))])  # the last token is never computed
            blocks = chain[stride::stride]
            limit = (len(ids) - 1) // BLOCK
            cached += BLOCK * next((i for i, block in enumerate(blocks[:limit]) if block not in held), limit)
            held.update(blocks)
            prompt += len(ids)
        return Best(prompt, cached)

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(self.prompt_tokens, 1)
