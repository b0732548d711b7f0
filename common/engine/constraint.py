"""One sequence under a grammar: what it may say next, and when it has ended. Made by `common.engine.structured`.

    accept(token) ... -> ended: nothing but the end may follow, and the sequence ends with that token

A sequence whose text may end here but need not draws its end-of-sequence token like any other; the grammar allows that
token, and stop tokens beside it, in no other place. With `ignore_eos` it is never allowed: such a sequence ends where
nothing else can follow, or by its length. A stop token that the grammar has a place for as text ends the sequence.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from common.engine.structured_source import compilable
from common.errors import InvalidRequestError, UnsupportedError
from common.types import Grammar

Matcher = LLMatcher

# what one grammar may cost: about 10 ms of regular expressions, and in steps 7 ms of them and 2.5 ms of parsing
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_items_in_row=20_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_MAX_REASON_CHARS = 400
_NO_WAY_ON = "NoExtension"  # how the library says so


class Vocabulary:
    """The tokens of a model as bytes, read from its folder when first needed (about half a second)."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._file = folder / "tokenizer.json"
        self.vocab_size = vocab_size
        self.eos_ids = sorted(i for i in eos_ids if i < vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._specials: dict[str, int] | None = None
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        return bool(self.eos_ids) and (self._tokenizer is not None or self._file.is_file())

    @property
    def tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                source = self._file.read_text(encoding="utf-8")
                try:
                    self._tokenizer = LLTokenizer(source, n_vocab=self.vocab_size, eos_token=self.eos_ids)
                except ValueError:
                    self._tokenizer = self._larger(source)
            return self._tokenizer

    def _larger(self, source: str) -> LLTokenizer:
        """Of a tokenizer that has more tokens than the model."""
        try:
            return LLTokenizer(source, eos_token=self.eos_ids)
        except ValueError as error:
            raise UnsupportedError(
                f"needs a tokenizer of another kind than this model's: {_shown(str(error))}"
            ) from None

    @property
    def specials(self) -> dict[str, int]:
        """Tokens that stand for no text, by how they are written: to llguidance, all that are added in angles too."""
        is_special = self.tokenizer.is_special_token
        with self._lock:
            if self._specials is None:
                added = json.loads(self._file.read_bytes()).get("added_tokens") or []
                self._specials = {t["content"]: t["id"] for t in added if t.get("content") and is_special(t["id"])}
            return self._specials

    @property
    def num_words(self) -> int:
        """Of 32 bits, of a mask as the tokenizer makes it."""
        return -(-self.tokenizer.vocab_size // 32)


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """Its state before the first token. `InvalidRequestError` says why there is none: the message lacks the field."""
    try:
        source = compilable(grammar, vocabulary.specials)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("cannot be used: " + _shown(str(error))) from None
    matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=_LIMITS)
    mask_W = np.frombuffer(matcher.compute_bitmask(), np.uint32).copy() if not matcher.is_error() else None
    if matcher.stop_reason().startswith(_NO_WAY_ON) or matcher.get_error().startswith(_NO_WAY_ON):
        raise InvalidRequestError("is impossible: no text follows it")
    if matcher.is_error() or mask_W is None:
        raise InvalidRequestError("cannot be used: " + _shown(matcher.get_error()))
    for token_id in vocabulary.eos_ids:
        mask_W[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    if not mask_W.any():
        raise InvalidRequestError("is impossible: no text but the empty one follows it")
    return matcher


def _shown(reason: str) -> str:
    """What the library says, in one line that a client can read."""
    return " ".join(reason.replace("<non-verbose/>", "").split())[:_MAX_REASON_CHARS]


class Constraint:
    """`num_followed`: output tokens that it has seen. `error`: why it cannot go on; the sequence must not either."""

    __slots__ = ("_bits", "_eos_words", "_ignore_eos", "error", "matcher", "num_followed", "param")

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, param: str, stop_ids: frozenset[int], *, ignore_eos: bool
    ) -> None:
        self.matcher = matcher
        self.param = param
        self.num_followed = 0
        self.error = ""
        self._ignore_eos = ignore_eos
        self._eos_words = [(i // 32, np.uint32(1 << i % 32)) for i in vocabulary.eos_ids]
        others = stop_ids.difference(vocabulary.eos_ids)
        self._bits = [(i // 32, np.uint32(1 << i % 32)) for i in sorted(others) if i < vocabulary.vocab_size]

    @property
    def ended(self) -> bool:
        """Can nothing but the end follow?"""
        return self.matcher.is_stopped() and not self.error

    def accept(self, token_id: int) -> None:
        """The next output token, which is none that ends the sequence."""
        self.num_followed += 1
        if not self.error and not self.matcher.consume_token(token_id):
            self.fail()

    def fail(self, reason: str = "") -> None:
        """It cannot go on: for what the matcher says, if no reason is given."""
        self.error = _shown(reason or self.matcher.get_error()) or "the grammar's state is lost"

    def follow(self, token_ids: Sequence[int]) -> None:
        """Output tokens that were there before. InvalidRequestError if they do not follow the grammar."""
        if token_ids and not self.matcher.consume_tokens(list(token_ids)):
            raise InvalidRequestError("the tokens sent do not follow the request's grammar", param="sent")
        self.num_followed = len(token_ids)

    def allows(self, token_ids: Sequence[int]) -> int:
        """How many of these may follow, one after the other."""
        if self.error or not token_ids:
            return 0
        return self.matcher.validate_tokens(list(token_ids))

    def finish_mask(self, words_W: NDArray[np.uint32]) -> None:
        """Change a mask of what may follow: where the text may end, so may the sequence, as its parameters say."""
        word, bit = self._eos_words[0]
        may_end = bool(words_W[word] & bit)
        if may_end and self._ignore_eos:
            for word, bit in self._eos_words:
                words_W[word] &= ~bit
        elif may_end:
            for word, bit in self._bits:
                words_W[word] |= bit

    def failure(self) -> InvalidRequestError:
        """What a client is told of `error`."""
        return InvalidRequestError(f"{self.param} cannot be followed: {self.error}", param=self.param)
