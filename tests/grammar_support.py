"""Whether a text may be a whole answer under a grammar, for tokenizers that know marks in different ways."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import text_support
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from common.engine.constraint import Vocabulary, compile_grammar
from common.types import Grammar

WAYS = ("special", "tokens", "text")  # in which a tokenizer knows a mark


def write_tokenizer(folder: Path, marks: Iterable[str], way: str) -> Path:
    """A byte-level tokenizer in `folder`, which is returned."""
    raw = RawTokenizer.from_str(text_support.byte_level().to_str())
    if way != "text":
        for mark in marks:
            raw.add_tokens([AddedToken(mark, special=way == "special", normalized=False)])
    raw.save(str(folder / "tokenizer.json"))
    return folder


@cache
def encoder(folder: Path) -> RawTokenizer:
    return RawTokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary(folder, encoder(folder).get_vocab_size(), frozenset({2}))


def allows(folder: Path, grammar: Grammar, text: str) -> bool:
    """Whether the text may be a whole answer."""
    matcher = compile_grammar(grammar, vocabulary(folder))
    ids = encoder(folder).encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())
