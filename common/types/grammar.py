"""What an answer has to look like, as the client wrote it: compiled by the worker that samples.

Here, and so where a request enters, only size and JSON syntax are checked. Whether the source can be compiled, and is
not too large for that, is said by the decode worker before the first token.
"""

from __future__ import annotations

import enum
import json
from typing import Any

import msgspec

from common.errors import InvalidRequestError

MAX_SOURCE_BYTES = 256 << 10


class GrammarKind(enum.StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object; the source is empty
    JSON_SCHEMA = "json_schema"  # source: a JSON schema
    REGEX = "regex"  # source: a regular expression that the whole answer matches
    CHOICE = "choice"  # source: a JSON array of strings, one of which is the answer
    GRAMMAR = "grammar"  # source: a context-free grammar, in Lark's or GBNF's form
    STRUCTURAL_TAG = "structural_tag"  # source: JSON; free text in which tags begin parts with a schema


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """`param`: the field of the request that asked for it, for errors.

    Where `skip_close` is set, free text up to that mark may come first: with `skip_open`, if the output begins with
    that mark, without it always.
    """

    kind: GrammarKind
    source: str = ""
    param: str = "response_format"
    skip_open: str = ""
    skip_close: str = ""

    def __post_init__(self) -> None:
        nbytes = len(self.source) if self.source.isascii() else len(self.source.encode("utf-8", "surrogatepass"))
        if nbytes > MAX_SOURCE_BYTES:
            raise self._fault(f"has {nbytes} bytes; the limit is {MAX_SOURCE_BYTES}")
        if self.kind is GrammarKind.JSON_OBJECT:
            if self.source:
                raise self._fault("takes no schema with json_object")
            return
        if not self.source.strip():
            raise self._fault("must not be empty")
        if self.kind in (GrammarKind.REGEX, GrammarKind.GRAMMAR):
            return
        try:
            value: Any = json.loads(self.source)
        except (ValueError, RecursionError) as error:
            raise self._fault(f"is not valid JSON: {error}") from None
        self._check_json(value)

    def _check_json(self, value: Any) -> None:
        """What is there to be JSON of the right shape."""
        if self.kind is GrammarKind.JSON_SCHEMA and not isinstance(value, dict | bool):
            raise self._fault("must be a JSON schema: an object")
        if self.kind is GrammarKind.STRUCTURAL_TAG and not isinstance(value, dict):
            raise self._fault("must be an object")
        if self.kind is GrammarKind.CHOICE and not (
            isinstance(value, list) and value and all(isinstance(entry, str) for entry in value)
        ):
            raise self._fault("must be an array of at least one string")

    def _fault(self, message: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.param} {message}", param=self.param)
