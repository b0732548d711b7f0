"""What bytes each token stands for, read once from a tokenizer's decoder.

Two decoder families make decoding a plain concatenation of bytes, and every checkpoint served today is one
of them:

- byte level (GPT-2, Llama 3, Qwen, DeepSeek ...): each character of a token is one byte;
- SentencePiece (Llama 2, Gemma, Mistral ...): `Replace` per token, `<0xXX>` byte tokens, `Fuse`, and a `Strip`
  of leading spaces of the whole text.

For them a detokenizer is a table look-up and an incremental UTF-8 decoder: O(1) per token, nothing is decoded
twice. `TokenPieces.of` returns None for any other decoder (`common.text.detokenizer` then decodes a window).

Bytes that are not UTF-8 become U+FFFD: per maximal ill-formed run in byte-level models, per byte in
SentencePiece models, as `tokenizers` does. One case differs on purpose: a SentencePiece run of byte tokens that
is only partly ill-formed keeps its well-formed characters, where `tokenizers` would turn the whole run into
U+FFFD after they have been streamed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from tokenizers import Tokenizer as RawTokenizer

BYTEWISE = "nanodeploy.bytewise"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "�" * (error.end - error.start), error.end


codecs.register_error(BYTEWISE, _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


@dataclass(frozen=True)
class _Rules:
    """How a token's string becomes bytes."""

    byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_content: str = ""
    strip_count: int = 0

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token written as plain text
                return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def _flat_steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flat_steps(step)
    else:
        yield decoder


def _rules_of(decoder: dict[str, Any] | None) -> _Rules | None:
    """The rules of a `decoder` section of tokenizer.json; None if decoding is not a concatenation of bytes."""
    if decoder is None:
        return None
    steps = list(_flat_steps(decoder))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _Rules(byte_level=True) if set(kinds) <= {"ByteLevel", "Fuse"} else None
    order = {"Replace": 0, "Metaspace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    ranks = [order.get(kind, -1) for kind in kinds]
    if not kinds or -1 in ranks or ranks != sorted(ranks) or kinds.count("Strip") > 1:
        return None
    replacements: list[tuple[str, str]] = []
    strip_content, strip_count, fused = "", 0, "Fuse" in kinds
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            if step.get("prepend_scheme", "always") != "never":
                return None  # the first token is decoded unlike the others
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Strip":
            if step["stop"] or not fused:
                return None
            strip_content, strip_count = step["content"], step["start"]
    return _Rules(False, tuple(replacements), "ByteFallback" in kinds, strip_content, strip_count)


class TokenPieces(dict[int, bytes]):
    """Token id -> its bytes, filled on first use; ids outside the vocabulary are empty."""

    def __init__(self, raw: RawTokenizer, rules: _Rules, skipped: frozenset[int]) -> None:
        super().__init__()
        self._raw = raw
        self._rules = rules
        self._skipped = skipped
        self.errors = "replace" if rules.byte_level else BYTEWISE
        self.strip_content = rules.strip_content
        self.strip_count = rules.strip_count
        self.written = WrittenPieces(self)

    @classmethod
    def of(cls, raw: RawTokenizer, *, skipped: frozenset[int] = frozenset()) -> TokenPieces | None:
        """The pieces of a tokenizer; tokens in `skipped` are empty. None if its decoder needs more than a table."""
        rules = _rules_of(json.loads(raw.to_str())["decoder"])
        return None if rules is None else cls(raw, rules, skipped)

    def with_skipped(self, skipped: frozenset[int]) -> TokenPieces:
        return TokenPieces(self._raw, self._rules, skipped)

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._raw.id_to_token(token_id)
        piece = b"" if token is None else self._rules.to_bytes(token)
        self[token_id] = piece
        return piece


class WrittenPieces(dict[int, bytes]):
    """Token id -> its text as a JSON string, filled on first use. Empty where it is no text by itself, or none."""

    def __init__(self, pieces: TokenPieces) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, token_id: int) -> bytes:
        try:
            text = self._pieces[token_id].decode()
        except UnicodeDecodeError:
            text = ""
        written = self[token_id] = orjson.dumps(text) if text else b""
        return written
