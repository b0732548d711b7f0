from __future__ import annotations

import time
from collections.abc import Callable

import orjson
import pytest
import text_support
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from common.text import Tokenizer
from common.text.detokenizer import ByteDetokenizer, WindowDetokenizer

FAMILIES = [text_support.byte_level, text_support.byte_fallback, text_support.word_piece]
TEXTS = ["Hello, world!", "  two  spaces ", "你好世界 🙂🚀👨‍👩‍👧 ok", "naïve café\n\ttab", "<think>a <two words> b", ""]


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, skip: bool, at_start: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, at_start=at_start)
    pieces, done = [], 0
    for cut in [*sorted(min(c, len(ids)) for c in cuts), len(ids)]:
        if cut > done:
            pieces.append(detokenizer.push(ids[done:cut]))
            done = cut
    return [*pieces, detokenizer.finish()]


def keep_well_formed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Our rule for byte tokens that are not UTF-8 (see common.text.pieces), the slow way."""
    data, text = b"".join(tokenizer.token_bytes(i) for i in ids), ""
    while data:
        for size in (1, 2, 3, 4, 0):
            try:
                char = data[:size].decode()
            except UnicodeDecodeError:
                continue
            break
        text += char or "�"
        data = data[max(size, 1) :]
    return text.removeprefix(" ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_streamed_pieces_are_the_whole(family: Callable[[], RawTokenizer], skip: bool, data: st.DataObject) -> None:
    raw = family()
    tokenizer = Tokenizer(raw)
    ids = data.draw(st.lists(st.integers(0, raw.get_vocab_size() + 3), max_size=60))
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=60))
    text = "".join(stream(tokenizer, ids, cuts, skip=skip))
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    expected = raw.decode(ids, skip_special_tokens=skip)
    if family is text_support.byte_fallback and "�" in expected:
        assert text == keep_well_formed(tokenizer, [i for i in ids if not (skip and i in tokenizer.special_ids)])
    else:
        assert text == expected


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_written_texts_are_what_each_token_gives(family: Callable[[], RawTokenizer], data: st.DataObject) -> None:
    raw = family()
    tokenizer = Tokenizer(raw)
    random_ids = data.draw(st.lists(st.integers(0, raw.get_vocab_size() + 3), max_size=30))
    ids = [*random_ids, *tokenizer.encode(data.draw(st.sampled_from(TEXTS))), *random_ids[::-1]]
    at_start = data.draw(st.booleans())
    one, other = (tokenizer.detokenizer(skip_special_tokens=True, at_start=at_start) for _ in range(2))
    while ids:
        count = data.draw(st.integers(1, 8))
        now, ids = ids[:count], ids[count:]
        if data.draw(st.booleans()):
            assert one.push(now) == other.push(now)
        else:
            texts = [text for token in now if (text := other.push((token,)))]
            assert one.written(now) == [orjson.dumps(text) for text in texts]
    assert one.finish() == other.finish()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_real_text_token_by_token(family: Callable[[], RawTokenizer], text: str) -> None:
    tokenizer = Tokenizer(family())
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, list(range(len(ids))), skip=True)
    assert "".join(pieces) == tokenizer.raw.decode(ids)
    if family is not text_support.word_piece:
        assert "".join(pieces) == text
        assert not any("�" in piece for piece in pieces), "a partial character leaked"
        assert pieces[-1] == ""


def test_byte_families_take_the_table_and_others_the_window() -> None:
    assert isinstance(Tokenizer(text_support.byte_level()).detokenizer(), ByteDetokenizer)
    assert isinstance(Tokenizer(text_support.byte_fallback()).detokenizer(), ByteDetokenizer)
    assert isinstance(Tokenizer(text_support.word_piece()).detokenizer(), WindowDetokenizer)


def test_every_prefix_of_an_emoji_is_held_back() -> None:
    tokenizer = Tokenizer(text_support.byte_fallback())
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in "é🙂".encode()]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == ["", "é", "", "", "", "🙂"]


def test_dangling_bytes_come_out_at_the_end() -> None:
    tokenizer = Tokenizer(text_support.byte_fallback())
    first = tokenizer.token_id("<0xF0>")
    assert first is not None
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "�"


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = Tokenizer(text_support.byte_fallback())
    whole = tokenizer.encode("Hello world", add_special_tokens=False)
    second = next(n for n in range(1, len(whole)) if tokenizer.token_string(whole[n]).startswith("▁"))
    rest = whole[second:]
    assert "".join(stream(tokenizer, rest, [], skip=True, at_start=False)) == " world"
    assert "".join(stream(tokenizer, rest, [], skip=True, at_start=True)) == "world"
    words = Tokenizer(text_support.word_piece())
    prompt, rest = words.encode("Hello"), words.encode("world")
    window = words.detokenizer(context=prompt)
    assert window.push(rest) + window.finish() == " world"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = Tokenizer(text_support.byte_level())
    ids = tokenizer.encode("hi<|im_end|>there")
    assert tokenizer.decode(ids) == "hithere"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi<|im_end|>there"
    assert tokenizer.token_bytes(tokenizer.token_id("<|im_end|>") or 0) == b"<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_per_token_does_not_grow(family: Callable[[], RawTokenizer]) -> None:
    """Held-back garbage and skipped specials included: 10 times the tokens cost at most 40 times the time."""
    tokenizer = Tokenizer(family())
    pattern = [*range(12), *([5] * 20), *(tokenizer.encode("plain text") * 3)]

    def seconds(repeats: int) -> float:
        detokenizer = tokenizer.detokenizer()
        start = time.process_time()
        for token in pattern * repeats:
            detokenizer.push([token])
        return time.process_time() - start

    seconds(1)
    assert seconds(100) < 40 * max(seconds(10) for _ in range(3))
