"""One choice's tokens become its text: detokenized, cut at stop strings, with what logprobs need.

    push(delta) ... until `finish` is set: by a stop string here, or by the delta's own finish

Tokens after the one that completed a stop string do not exist: they are neither counted nor shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.text import StopAutomaton, StopMatcher, Tokenizer
from common.types import ChoiceDelta, SamplingParams, TokenLogprobs

CONTEXT_TOKENS = 16  # of the prompt, for decoders that look back


class Piece(NamedTuple):
    """What a delta added. `offsets` (of each token in the choice's text) only where logprobs were asked for."""

    text: str
    token_ids: Sequence[int]
    logprobs: TokenLogprobs | None
    offsets: list[int]
    ends: bool


class ChoiceText:
    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_offset",
        "_stop_ids",
        "finish",
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
    ) -> None:
        """`automaton` is that of `sampling.stop`, None without; `offset`: characters before the output (echo)."""
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=sampling.skip_special_tokens, context=prompt[-CONTEXT_TOKENS:]
        )
        self._include_stop = sampling.include_stop_str_in_output
        self._matcher = StopMatcher(automaton, include_stop=self._include_stop) if automaton else None
        self._min_tokens = sampling.min_tokens
        self._stop_ids = sampling.stop_token_ids
        self.plain = automaton is None and sampling.logprobs is None
        self._offset = offset
        self.num_tokens = 0
        self.finish: str | None = None
        self.stop_reason: str | int | None = None

    def push_plain(self, token_ids: Sequence[int]) -> str:
        """The text of a delta that does not end the choice, where neither stop strings nor logprobs were asked for."""
        self.num_tokens += len(token_ids)
        return self._detokenizer.push(token_ids)

    def push(self, delta: ChoiceDelta) -> Piece:
        ids, logprobs = delta.token_ids, delta.logprobs
        offsets: list[int] = []
        hidden = delta.stop_token_id is not None and not self._include_stop  # the last token is not text
        if self.plain:
            shown = ids[:-1] if hidden else ids
            text = self._detokenizer.push(shown) if shown else ""
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
        return Piece(text, ids, logprobs, offsets, self.finish is not None)

    def _one_by_one(self, ids: Sequence[int], hidden: bool) -> tuple[str, list[int]]:
        """Token by token: where each begins, and which completed a stop string."""
        text, offsets, last = "", [], len(ids) - 1
        for index, token in enumerate(ids):
            offsets.append(self._offset)
            self.num_tokens += 1
            if hidden and index == last:
                break
            piece = self._detokenizer.push((token,))
            self._offset += len(piece)
            text += self._match(piece)
            if self.finish is not None:
                break
        return text, offsets

    def _match(self, piece: str) -> str:
        matcher = self._matcher
        if matcher is None or self.num_tokens <= self._min_tokens:
            return piece
        text = matcher.push(piece)
        if matcher.matched is not None:
            self.finish, self.stop_reason = "stop", matcher.matched
        return text

    def _close(self) -> str:
        rest = self._detokenizer.finish()
        text = self._match(rest) if rest else ""
        if self._matcher is not None and self.finish is None:
            text += self._matcher.flush()
        return text


def _first(logprobs: TokenLogprobs | None, count: int) -> TokenLogprobs | None:
    if logprobs is None:
        return None
    top = count * logprobs.top_n
    return TokenLogprobs(
        logprobs.token_logprobs[:count], logprobs.top_n, logprobs.top_ids[:top], logprobs.top_logprobs[:top]
    )
