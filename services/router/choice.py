"""One choice's tokens become its text: detokenized, cut at stop strings, parsed, with what logprobs need.

    push(delta) ... until `finish` is set: by a stop string or a full number of calls here, or by the delta's own finish

Tokens after the one that completed a stop string, or the last call wanted, do not exist: they are neither counted
nor shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.text import StopAutomaton, StopMatcher, Tokenizer
from common.text.parsers import CallDelta, OutputParser, Parsed, ParserPlan
from common.types import ChoiceDelta, SamplingParams, TokenLogprobs

CONTEXT_TOKENS = 16  # of the prompt, for decoders that look back


class Piece(NamedTuple):
    """What a delta added. `offsets` (of each token in the choice's text) only where logprobs were asked for."""

    text: str
    token_ids: Sequence[int]
    logprobs: TokenLogprobs | None
    offsets: list[int]
    ends: bool
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()


class ChoiceText:
    __slots__ = (
        "_bulk",
        "_calls",
        "_detokenizer",
        "_include_stop",
        "_matcher",
        "_may_reason",
        "_min_tokens",
        "_offset",
        "_parser",
        "_reasoning",
        "_says_calls",
        "_stop_ids",
        "finish",
        "num_reasoning_tokens",
        "num_tokens",
        "plain",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        automaton: StopAutomaton | None,
        prompt: Sequence[int],
        offset: int = 0,
        parsing: ParserPlan | None = None,
    ) -> None:
        """`automaton` is that of `sampling.stop`, None without; `offset`: characters before the output (echo)."""
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=sampling.skip_special_tokens,
            context=prompt[-CONTEXT_TOKENS:],
            keep=() if parsing is None else parsing.marks,
        )
        self._include_stop = sampling.include_stop_str_in_output
        self._matcher = StopMatcher(automaton, include_stop=self._include_stop) if automaton else None
        self._min_tokens = sampling.min_tokens
        self._stop_ids = sampling.stop_token_ids
        self._parser: OutputParser | None = None if parsing is None else parsing.parser()
        self._may_reason = self._parser is not None and not self._parser.answers
        self._says_calls = parsing is not None and parsing.says_calls
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._bulk = automaton is None and sampling.logprobs is None and (parsing is None or not parsing.is_limited)
        self.plain = self._bulk and self._parser is None
        self._offset = offset
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish: str | None = None
        self.stop_reason: str | int | None = None

    def push_plain(self, token_ids: Sequence[int]) -> str:
        """The text of a delta that does not end the choice, where there is nothing to look for in it."""
        self.num_tokens += len(token_ids)
        return self._detokenizer.push(token_ids)

    def write_plain(self, token_ids: Sequence[int]) -> list[bytes]:
        """The same for deltas of a token each: a JSON string for each that has a text."""
        self.num_tokens += len(token_ids)
        return self._detokenizer.written(token_ids)

    def push(self, delta: ChoiceDelta) -> Piece:
        ids, logprobs = delta.token_ids, delta.logprobs
        offsets: list[int] = []
        hidden = delta.stop_token_id is not None and not self._include_stop  # the last token is not text
        if self._bulk:
            shown = ids[:-1] if hidden else ids
            if self._may_reason:
                text = "".join([self._read(self._detokenizer.push((token,))) for token in shown])
            else:
                text = self._parse(self._detokenizer.push(shown)) if shown else ""
            self.num_tokens += len(ids)
        else:
            text, offsets = self._one_by_one(ids, hidden)
            if len(offsets) < len(ids):
                ids = ids[: len(offsets)]
                logprobs = _first(logprobs, len(ids))
        if delta.finish is not None and self.finish is None:
            text += self._close()
            if self.finish is None:
                self.finish = delta.finish.value
                stopped = delta.stop_token_id
                self.stop_reason = stopped if stopped in self._stop_ids else None
        if self._parser is None:
            return Piece(text, ids, logprobs, offsets, self.finish is not None)
        return self._parsed(text, ids, logprobs, offsets)

    def _parsed(self, text: str, ids: Sequence[int], logprobs: TokenLogprobs | None, offsets: list[int]) -> Piece:
        parser = self._parser
        assert parser is not None
        if self.finish is not None:
            text += self._keep(parser.finish())
            cut = isinstance(self.stop_reason, str) and parser.is_within_call
            if self.finish == "stop" and parser.num_calls and self._says_calls and not cut:
                self.finish = "tool_calls"
        reasoning, calls = "".join(self._reasoning), self._calls
        self._reasoning, self._calls = [], []
        if parser.spent:
            self._parser, self.plain = None, self._bulk
        return Piece(text, ids, logprobs, offsets, self.finish is not None, reasoning, calls)

    def _one_by_one(self, ids: Sequence[int], hidden: bool) -> tuple[str, list[int]]:
        """Token by token: where each begins, and which completed a stop string or the last call."""
        text, offsets, last = "", [], len(ids) - 1
        for index, token in enumerate(ids):
            offsets.append(self._offset)
            self.num_tokens += 1
            if hidden and index == last:
                break
            piece = self._detokenizer.push((token,))
            self._offset += len(piece)
            text += self._read(piece)
            if self.finish is not None:
                break
        return text, offsets

    def _read(self, piece: str) -> str:
        """A token's text. A token is reasoning if the model reasons before it and goes on with that after it."""
        parser = self._parser
        if not self._may_reason or parser is None:
            return self._match(piece)
        reasons = parser.reasons
        text = self._match(piece)
        self._may_reason = not parser.answers
        if reasons and parser.reasons:
            self.num_reasoning_tokens += 1
        return text

    def _match(self, piece: str) -> str:
        matcher = self._matcher
        if matcher is None or self.num_tokens <= self._min_tokens:
            return self._parse(piece)
        text = matcher.push(piece)
        if matcher.matched is not None:
            self.finish, self.stop_reason = "stop", matcher.matched
        return self._parse(text)

    def _parse(self, text: str) -> str:
        """The content in a text; reasoning and calls are kept for the piece."""
        parser = self._parser
        if parser is None or not text:
            return text
        content = self._keep(parser.push(text))
        if parser.full and self.finish is None and self.num_tokens > self._min_tokens:
            self.finish = "stop"
        return content

    def _keep(self, parsed: Parsed) -> str:
        if parsed.reasoning:
            self._reasoning.append(parsed.reasoning)
        if parsed.calls:
            self._calls.extend(parsed.calls)
        return parsed.content

    def _close(self) -> str:
        rest = self._detokenizer.finish()
        text = self._match(rest) if rest else ""
        if self._matcher is not None and self.finish is None:
            text += self._parse(self._matcher.flush())
        return text


def _first(logprobs: TokenLogprobs | None, count: int) -> TokenLogprobs | None:
    if logprobs is None:
        return None
    top = count * logprobs.top_n
    return TokenLogprobs(
        logprobs.token_logprobs[:count], logprobs.top_n, logprobs.top_ids[:top], logprobs.top_logprobs[:top]
    )
