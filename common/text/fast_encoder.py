"""Encoding by fastokens, several times as fast as `tokenizers`, where it gives the same tokens.

    tokenizer.json -> fastokens reads it? -> same tokens for every probe? -> it encodes
    else `tokenizers` does, and why is said

Both read the same file. What one of them is known to do otherwise than the other would be a wrong prompt, so probes
of all kinds of text are compared once, when a tokenizer is loaded; `tests/test_text_fast_encoder.py` compares more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from common.telemetry import get_logger

Encode = Callable[[str, bool], list[int]]
"""(text, add special tokens) -> ids. UnicodeEncodeError for what is not valid Unicode."""

_SEGMENTS_NBYTES = 16 << 20  # of texts between special tokens that were seen before: turns of one conversation
_LONG_S = "\u017f"  # an s where case does not count, as in (?i:'s), to tokenizers alone
_PROBES = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs\n\n\nlines \r\n  ",
    "I'm sure they've said it'd rain; we'll see. DON'T! it'S",
    "x = [i**2 for i in range(10_000)]  # 3.14159, 0x1F, 1e-9, 1234567890123",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "units": null}}',
    "naïve café Ångström e\u0301 ﬁ ½ Ⅷ ㎏ İstanbul ß ẞ",
    "日本語のテキストと中文字符，以及한국어 문장입니다。",
    "Привет, мир! Γειά σου Κόσμε! שלום עולם مرحبا بالعالم हिन्दी ไทย",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 👍🏽 \u200b\u200d\ufeff\u00a0\u2028\u3000 \x00\x07\x1b",
    "https://example.org/a/b?c=d&e=%20f#g  user@example.org  C:\\path\\file.txt",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "--------====++++____!!!!????....,,,,;;;;::::((((())))]]]]{{{{}}}}",
)

log = get_logger(__name__)


def fast_encode(raw: RawTokenizer, path: str) -> Encode | None:
    """How to encode by fastokens as `raw`, read from `path`, does; None if that cannot be had, which is logged."""
    try:
        import fastokens
    except ImportError:
        log.info("prompts are encoded by tokenizers", reason="fastokens is not installed")
        return None
    try:
        tokenizer: Any = fastokens.Tokenizer.from_file(path)
    except Exception as error:  # noqa: BLE001 - its own errors are plain ones: it cannot read this file
        log.info("prompts are encoded by tokenizers", reason=f"fastokens cannot read {path}: {error}")
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        if _LONG_S in text:
            exact: list[int] = raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return exact
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    wrong = _first_difference(raw, encode)
    if wrong is not None:
        log.warning("prompts are encoded by tokenizers", reason=f"fastokens gives other tokens for {wrong!r}")
        return None
    tokenizer.enable_segment_cache(_SEGMENTS_NBYTES)
    return encode


def _first_difference(raw: RawTokenizer, encode: Encode) -> str | None:
    """The first probe that is encoded otherwise; added tokens are tried inside a text and side by side."""
    added = [token.content for _, token in sorted(raw.get_added_tokens_decoder().items())][:64]
    mixed = [f"a {token}b\n{token} {token}c" for token in added]
    for text in (*_PROBES, *mixed, "".join(added), " ".join(_PROBES)):
        for special in (True, False):
            want = raw.encode_batch_fast([text], add_special_tokens=special)[0].ids
            try:
                same = encode(text, special) == want
            except Exception:  # noqa: BLE001 - whatever it cannot encode, it cannot serve
                same = False
            if not same:
                return text
    return None
