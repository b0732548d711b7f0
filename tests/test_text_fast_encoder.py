"""fastokens against tokenizers, for the splits of texts that the families' tokenizers have, on texts of all kinds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import text_support
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from common.text import Tokenizer
from common.text.fast_encoder import fast_encode

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = LETTERS + r"\p{N}{1,3}" + OTHERS
QWEN = LETTERS + r"\p{N}" + OTHERS
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    parts: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ]),
    "llama3": lambda: splits(LLAMA3),
    "qwen": lambda: splits(QWEN),
    "deepseek": lambda: splits(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK),
}  # fmt: skip


@cache
def trained(name: str) -> RawTokenizer:
    if name == "sentencepiece":
        return text_support.byte_fallback()
    raw = RawTokenizer(models.BPE(ignore_merges=name == "llama3"))
    raw.normalizer = normalizers.NFC() if name == "qwen" else None
    raw.pre_tokenizer = PRE_TOKENIZERS[name]()
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(text_support.CORPUS, trainer)
    raw.add_tokens([AddedToken("<think>", special=False), AddedToken("<|tool▁call|>", special=True, lstrip=True)])
    return raw


@cache
def loaded(name: str) -> Any:
    """Of a file, as a checkpoint has it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        trained(name).save(str(path))
        return fast_encode(trained(name), str(path))


PIECES = st.one_of(
    st.sampled_from(
        [*"'’\"\\ \t\n\r.,-_/0123456789", "'S", "'re", "  ", "\r\n", "<|im_end|>", "<think>", "<|tool▁call|>"]
    ),
    st.sampled_from(" ".join(text_support.CORPUS[:4]).split()),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece"])
@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, max_size=40), special=st.booleans())
def test_same_tokens(name: str, pieces: list[str], special: bool) -> None:
    encode = loaded(name)
    assert encode is not None, "fastokens reads this family's file, and agrees on the probes"
    text = "".join(pieces)
    assert encode(text, special) == trained(name).encode_batch_fast([text], add_special_tokens=special)[0].ids


def test_a_tokenizer_that_it_cannot_read_is_left_to_the_other(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text_support.word_piece().save(str(path))
    with capture_logs() as logs:
        tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the sky") == text_support.word_piece().encode("the sky").ids
    assert [entry["event"] for entry in logs] == ["prompts are encoded by tokenizers"]


def test_one_that_gives_other_tokens_is_not_used(tmp_path: Path) -> None:
    """The file is another vocabulary than that of the tokenizer that it is compared with."""
    spec = json.loads(trained("gpt2").to_str())
    spec["model"]["merges"] = spec["model"]["merges"][:50]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with capture_logs() as logs:
        assert fast_encode(trained("gpt2"), str(path)) is None
    assert "other tokens" in logs[-1]["reason"]


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN])
def test_a_long_s_behind_an_apostrophe_is_an_s(tmp_path: Path, pattern: str) -> None:
    """By Unicode's folding, (?i:'s) is `'ſ` as well, and what follows it is a word of its own."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = splits(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(["das iſt ſtill und ſteht"] * 20, trainer)
    path = tmp_path / "tokenizer.json"
    raw.save(str(path))
    encode = fast_encode(raw, str(path))
    assert encode is not None
    for text in ("'ſt", "wie's ſteht und 'ſteht", "ſteht"):
        assert encode(text, False) == raw.encode(text).ids
