"""Tokens to text as they arrive, without decoding anything twice.

    push(ids) -> text that is final ... -> finish() -> what was held back

An incomplete UTF-8 sequence at the end is held back (at most 3 bytes); everything else is returned at once. The
concatenation of all returned pieces is the decoding of all ids, whatever the grouping of the pushes.

`ByteDetokenizer` needs the table of `common.text.pieces`. `WindowDetokenizer` serves decoders without one: it
decodes a short window twice, once with and once without the new tokens, and returns the difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import orjson
from tokenizers import Tokenizer as RawTokenizer

from common.text.pieces import TokenPieces

_WINDOW = 8  # tokens before the new ones; what precedes them no longer changes how they decode
_HOLD = 8  # tokens a dangling U+FFFD may be held back for


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class WritingDetokenizer(Detokenizer, Protocol):
    def written(self, token_ids: Sequence[int]) -> list[bytes]:
        """What `push` gives for each token by itself, as JSON strings. Nothing for one without text."""
        ...


class ByteDetokenizer:
    """`at_start` False: the text continues another, so leading spaces are kept."""

    __slots__ = ("_errors", "_pending", "_pieces", "_strip_left")

    def __init__(self, pieces: TokenPieces, *, at_start: bool) -> None:
        self._pieces = pieces
        self._errors = pieces.errors
        self._pending = b""
        self._strip_left = pieces.strip_count if at_start else 0

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        data = pieces[token_ids[0]] if len(token_ids) == 1 else b"".join([pieces[i] for i in token_ids])
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[used:]
        return self._strip(text) if self._strip_left else text

    def written(self, token_ids: Sequence[int]) -> list[bytes]:
        table = self._pieces.written
        if not self._pending and not self._strip_left:
            found = list(map(table.__getitem__, token_ids))
            if b"" not in found:
                return found
        found = []
        for token in token_ids:
            text = b"" if self._pending or self._strip_left else table[token]
            if text or (text := _as_json(self.push((token,)))):
                found.append(text)
        return found

    def finish(self) -> str:
        text, _ = codecs.utf_8_decode(self._pending, self._errors, True)
        self._pending = b""
        return self._strip(text) if self._strip_left else text

    def _strip(self, text: str) -> str:
        start = 0
        while start < len(text) and self._strip_left and text[start] == self._pieces.strip_content:
            start += 1
            self._strip_left -= 1
        if start < len(text):
            self._strip_left = 0
        return text[start:]


class WindowDetokenizer:
    """`context` is what precedes (the end of the prompt), so that the first token is decoded as a continuation.

    Tokens in `hidden` are not decoded.
    """

    __slots__ = ("_hidden", "_ids", "_raw", "_read")

    def __init__(self, raw: RawTokenizer, *, hidden: frozenset[int], context: Sequence[int] = ()) -> None:
        self._raw = raw
        self._hidden = hidden
        self._ids = self._shown(context)[-_WINDOW:]
        self._read = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(self._shown(token_ids))
        return self._take(final=False)

    def written(self, token_ids: Sequence[int]) -> list[bytes]:
        return [text for token in token_ids if (text := _as_json(self.push((token,))))]

    def finish(self) -> str:
        return self._take(final=True)

    def _shown(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if token not in self._hidden]

    def _take(self, *, final: bool) -> str:
        before = self._raw.decode(self._ids[: self._read], skip_special_tokens=False)
        after = self._raw.decode(self._ids, skip_special_tokens=False)
        dangling = after.endswith("�") and len(self._ids) - self._read < _HOLD
        if dangling and not final:
            return ""
        if self._read > 4 * _WINDOW:
            self._ids = self._ids[self._read - _WINDOW :]
        self._read = len(self._ids)
        return after[len(before) :]


def _as_json(text: str) -> bytes:
    return orjson.dumps(text) if text else b""
