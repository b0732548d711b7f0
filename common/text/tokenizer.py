"""A checkpoint's tokenizer, without torch and transformers.

Read from `tokenizer.json` (the algorithm), `tokenizer_config.json` and `special_tokens_map.json` (which tokens
are BOS, EOS ...), `generation_config.json` (the checkpoint's own sampling defaults) and the chat template, where
there is one. Immutable after `load` and safe to use from several threads; encoding releases the GIL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from common.errors import ConfigError, InvalidRequestError
from common.text.chat_template import ChatTemplate
from common.text.detokenizer import ByteDetokenizer, WindowDetokenizer, WritingDetokenizer
from common.text.fast_encoder import Encode, fast_encode
from common.text.pieces import TokenPieces

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SURE_BELOW = 1 << 16  # characters; shorter texts are cheap to encode, no estimate needed
_NORMALIZER_SHRINK = 4  # a normalizer may shorten a text by at most about this (NFC: 3)


class Tokenizer:
    """`special_tokens` maps `bos_token`, `eos_token` ... to their text, as chat templates expect them."""

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        chat_template: ChatTemplate | None = None,
        encode: Encode | None = None,
    ) -> None:
        """`encode`: a faster way to what `raw` does."""
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self._encode = encode or self._encode_raw
        self.config = config or {}
        self.generation_config = generation_config or {}
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.special_ids = frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = raw.get_vocab_size()
        self.end_id = max(raw.get_vocab().values(), default=-1) + 1  # larger than every id; vocab_size may have gaps
        self._pieces = TokenPieces.of(raw)
        self._kept_pieces: dict[tuple[str, ...], TokenPieces] = {}  # by the special tokens that are text
        self._longest = max((len(token.encode()) for token in raw.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path, *, fast: bool = True) -> Tokenizer:
        """Raises `ConfigError` if the folder has no readable tokenizer.json or a broken chat template.

        `fast`: encode by fastokens where it gives the same tokens.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json: prepare the checkpoint first", param="model_path")
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}", param="model_path") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(_read_json(folder / "special_tokens_map.json"), config)
        generation = _read_json(folder / "generation_config.json")
        template = ChatTemplate.load(folder, config, special)
        raw.no_truncation()
        raw.no_padding()
        return cls(
            raw,
            special_tokens=special,
            config=config,
            generation_config=generation,
            chat_template=template,
            encode=fast_encode(raw, str(path)) if fast else None,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Of generation_config.json where it names them, else the EOS token's."""
        named = self.generation_config.get("eos_token_id")
        if isinstance(named, int):
            return (named,)
        if isinstance(named, list):
            return tuple(named)
        eos = self.token_id(self.special_tokens.get("eos_token", ""))
        return () if eos is None else (eos,)

    def token_id(self, token: str) -> int | None:
        found: int | None = self.raw.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens` runs the post-processor (BOS and the like)."""
        try:
            return self._encode(text, add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate: which of the two depends on the version
            raise InvalidRequestError("text is not valid Unicode", param="prompt") from error

    def _encode_raw(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, from its start."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens, at_start=True)
        return (stream.push(token_ids) if token_ids else "") + stream.finish()

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        at_start: bool = False,
        context: Sequence[int] = (),
        keep: tuple[str, ...] = (),
    ) -> WritingDetokenizer:
        """A stream of text. `at_start` False: it continues `context`, the end of the prompt.

        `keep`: special tokens that are not skipped.
        """
        if self._pieces is None:
            hidden = self._hidden(keep) if skip_special_tokens else frozenset()
            return WindowDetokenizer(self.raw, hidden=hidden, context=context)
        pieces = self._pieces if not skip_special_tokens else self._kept_pieces.get(keep)
        if pieces is None:
            pieces = self._kept_pieces[keep] = self._pieces.with_skipped(self._hidden(keep))
        return ByteDetokenizer(pieces, at_start=at_start)

    def _hidden(self, keep: tuple[str, ...]) -> frozenset[int]:
        """Special tokens but those kept."""
        return self.special_ids - {token for mark in keep if (token := self.token_id(mark)) is not None}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; special tokens are their own text. Empty if there is no such id."""
        if self._pieces is not None:
            return self._pieces[token_id]
        text: str = self.raw.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty if there is no such id."""
        return self.raw.id_to_token(token_id) or ""

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of `len(encode(text))`, to refuse hopelessly long texts without encoding them."""
        if len(text) < _SURE_BELOW or self._pieces is None:
            return 0
        return len(text) // (self._longest * _NORMALIZER_SHRINK)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Later sources win. A token is a string or an object with `content`."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_NAMES:
            value = source.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
    return found
