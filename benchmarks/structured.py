"""Time of grammars with real vocabularies: to read a tokenizer, to compile, and for each token's mask.

    python benchmarks/structured.py FOLDER_OF_A_MODEL [--vocab 151936] [--rounds 20]

Each answer is walked twice with a new state: the first walk finds what the library makes as it goes, the second what it
has kept. `--vocab` makes a larger vocabulary out of the model's, by pairs of its tokens. xgrammar is measured beside
llguidance where it is installed; it is no dependency.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": r"^[a-z.]+@[a-z]+\.[a-z]{2,3}$"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "gold"]}, "maxItems": 5},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": r"^\d{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        }
    },
}
ANSWER = {
    "name": "Ada Lovelace",
    "age": 36,
    "email": "ada.l@math.org",
    "tags": ["gold", "new"],
    "address": {"street": "12 St James's Square, London", "zip": "10117"},
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": PERSON | {"$defs": None} for i in range(60)},
    "required": [f"field_{i}" for i in range(60)],
    "additionalProperties": False,
    "$defs": PERSON["$defs"],
}
for _part in WIDE["properties"].values():  # type: ignore[attr-defined]
    del _part["$defs"]

CASES: dict[str, tuple[str, Any, str]] = {
    "object": ("json", {"type": "object"}, json.dumps(ANSWER)),
    "person": ("json", PERSON, json.dumps(ANSWER)),
    "60 persons": ("json", WIDE, json.dumps({f"field_{i}": ANSWER for i in range(60)})[:4000]),
    "regex": ("regex", r"[A-Z][a-z]+( [A-Z][a-z]+){1,4}, \d{4}-\d{2}-\d{2}", "Ada King Lovelace, 1815-12-10"),
}
Step = Callable[[int], float]


class Llguidance:
    name = "llguidance"

    def __init__(self, source: str, vocab_size: int) -> None:
        started = time.perf_counter()
        self.tokenizer = LLTokenizer(source, n_vocab=vocab_size, eos_token=[2])
        self.seconds = time.perf_counter() - started
        self._mask = np.empty(-(-vocab_size // 32), np.int32)

    def compile(self, kind: str, source: Any) -> LLMatcher:
        make = LLMatcher.grammar_from_json_schema if kind == "json" else LLMatcher.grammar_from_regex
        matcher = LLMatcher(self.tokenizer, make(source), log_level=0, limits=LLParserLimits(verbose_errors=False))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def state(self, compiled: LLMatcher) -> Step:
        matcher, mask = compiled.deep_copy(), self._mask

        def step(token_id: int) -> float:
            started = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            seconds = time.perf_counter() - started
            assert matcher.consume_token(token_id), matcher.get_error()
            return seconds

        return step


class Xgrammar:
    name = "xgrammar"

    def __init__(self, tokens: list[str], vocab_size: int) -> None:
        import xgrammar

        self._lib = xgrammar
        started = time.perf_counter()
        self._info = xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=[2], add_prefix_space=False
        )
        self.seconds = time.perf_counter() - started
        self._mask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def compile(self, kind: str, source: Any) -> Any:
        compiler = self._lib.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        return compiler.compile_json_schema(json.dumps(source)) if kind == "json" else compiler.compile_regex(source)

    def state(self, compiled: Any) -> Step:
        matcher, mask = self._lib.GrammarMatcher(compiled), self._mask

        def step(token_id: int) -> float:
            started = time.perf_counter()
            matcher.fill_next_token_bitmask(mask, 0)
            seconds = time.perf_counter() - started
            assert matcher.accept_token(token_id)
            return seconds

        return step


def enlarged(source: str, vocab_size: int) -> str:
    """The tokenizer with pairs of its tokens as further ones, that nothing merges to."""
    spec = json.loads(source)
    vocab: dict[str, int] = spec["model"]["vocab"]
    words = sorted((t for t in vocab if 2 < len(t) < 8), key=vocab.__getitem__)
    number = max(*vocab.values(), *(t["id"] for t in spec["added_tokens"])) + 1
    for i, first in enumerate(words):
        for second in words[i % 7 : 4000 : 9]:
            if number >= vocab_size:
                return json.dumps(spec)
            if first + second not in vocab:
                vocab[first + second] = number
                number += 1
    return json.dumps(spec)


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    source = (args.folder / "tokenizer.json").read_text()
    if args.vocab:
        source = enlarged(source, args.vocab)
    tokenizer = Tokenizer.from_str(source)
    vocab_size = args.vocab or tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    makers: list[Callable[[], Any]] = [lambda: Llguidance(source, vocab_size)]
    if importlib.util.find_spec("xgrammar") is not None:
        makers.append(lambda: Xgrammar(tokens, vocab_size))
    for make in makers:
        before = rss_mib()
        library = make()
        memory = rss_mib() - before
        print(f"{library.name}: vocabulary of {vocab_size} in {library.seconds * 1e3:.0f} ms, {memory:.0f} MiB")
        for name, (kind, grammar, text) in CASES.items():
            measure(library, name, kind, grammar, tokenizer.encode(text, add_special_tokens=False).ids, args.rounds)


def measure(library: Any, name: str, kind: str, grammar: Any, ids: list[int], rounds: int) -> None:
    before = rss_mib()
    compiles, first, later = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        compiled = library.compile(kind, grammar)
        compiles.append((time.perf_counter() - started) * 1e3)
        for times in (first, later):
            step = library.state(compiled)
            times += [step(token_id) * 1e6 for token_id in ids]
    print(
        f"  {name:<11} compile {statistics.median(compiles):8.2f} ms   masks of {len(ids)} tokens, us: "
        f"first {_spread(first)}   again {_spread(later)}   {rss_mib() - before:+.0f} MiB"
    )


def _spread(times: list[float]) -> str:
    ordered = sorted(times)
    return f"p50 {ordered[len(ordered) // 2]:.0f} p99 {ordered[len(ordered) * 99 // 100]:.0f} max {ordered[-1]:.0f}"


if __name__ == "__main__":
    main()
