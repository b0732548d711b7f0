"""Requests in an engine: admission, tokens as they come, and the one end each request gets.

    submit -> (delta rows) -> a finish on every choice, or the vector that was asked for
          `-> one failure: invalid, overloaded, out of time, or the step failed

EOS, stop token ids, min_tokens and lengths are decided here; stop strings belong to whoever makes text.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from collections.abc import Sequence as Tokens

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.engine.constraint import Constraint
from common.engine.media import Media, media_hashes
from common.engine.messages import PromptLogprobsOf, Submit
from common.engine.outbox import Outbox
from common.engine.pooling import pooled_vector
from common.engine.request_checks import ModelLimits, check_request
from common.engine.scheduler import Scheduler
from common.engine.sequence import Phase, Request, Sequence
from common.engine.structured import GrammarPool
from common.errors import (
    DeadlineExceededError,
    InternalError,
    NanoDeployError,
    UnavailableError,
    UnsupportedError,
)
from common.kvcache.manager import PrefixHit
from common.types import ChoiceDelta, Clock, FinishReason, Grammar, RequestStats, TokenLogprobs
from common.types.prefix import root_hash


class Requests:
    """Owns the requests of one engine, by slot."""

    def __init__(
        self,
        limits: ModelLimits,
        scheduler: Scheduler,
        media: Media,
        outbox: Outbox,
        clock: Clock,
        grammars: GrammarPool | None = None,
    ) -> None:
        self._grammars = grammars
        self._limits = limits
        self._scheduler = scheduler
        self._media = media
        self._outbox = outbox
        self._clock = clock
        self._by_slot: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count(1)
        self.draining = False
        self.finished: dict[str, int] = {}  # by finish reason or error code
        self.tokens_out = 0

    def __len__(self) -> int:
        return len(self._by_slot)

    @property
    def vocab_size(self) -> int:
        return self._limits.vocab_size

    @property
    def pools(self) -> bool:
        """Do requests end with a vector?"""
        return self._limits.pooling is not None

    def next_id(self) -> int:
        """A sequence id; orders draw from the same source."""
        return next(self._ids)

    def submit(self, message: Submit) -> None:
        """Admit a request or give it its one failure."""
        try:
            if self.draining:
                raise UnavailableError("the worker is draining")
            check_request(message.request, self._limits, self._media, len(self._scheduler.waiting))
        except NanoDeployError as error:
            self._count(error.code)
            self._outbox.fail(message.slot, error)
            return
        now = self._clock.now()
        deadline = now + message.remaining_s if message.remaining_s > 0 else math.inf
        request = Request(message.slot, message.request, [])
        ended = frozenset(message.request.ended_choices)
        choices = [c for c in range(message.request.sampling.n) if c not in ended]
        request.sequences = [self._sequence(message, c, deadline, leads=c == choices[0]) for c in choices]
        embeds = self._media.open(message.request.embeddings, lambda error: self.fail(message.slot, error))
        for seq in request.sequences:
            seq.embeds = embeds
        self._by_slot[message.slot] = request
        if deadline < math.inf:
            heapq.heappush(self._deadlines, (deadline, message.slot))
        if message.request.sampling.grammar is None:
            self._scheduler.add(request.sequences[0])
        else:
            self._compile(request, message.request.sampling.grammar)

    def _compile(self, request: Request, grammar: Grammar) -> None:
        """Have the grammar compiled, and its state of each choice brought up to what was sent; then schedule."""
        sequences = list(request.sequences)

        def ready(constraints: list[Constraint]) -> None:
            request.compiling = None
            for seq, constraint in zip(sequences, constraints, strict=True):
                seq.constraint = constraint
                if constraint.ended and seq.phase is not Phase.ENDED:
                    self._end(seq, FinishReason.STOP, ())  # what was sent is a whole answer
            if request.open_choices and request.sequences[0].phase is Phase.ENDED:
                self._pass_lead(request)
            elif request.open_choices:
                self._scheduler.add(request.sequences[0])

        def failed(error: NanoDeployError) -> None:
            request.compiling = None
            self.fail(request.slot, error)

        try:
            if self._grammars is None:
                raise UnsupportedError("this worker does not sample under a grammar", param=grammar.param)
            sent = [seq.token_ids[seq.num_prompt :] for seq in sequences]
            ends = [(seq.stop_ids, seq.sampling.ignore_eos) for seq in sequences]
            request.compiling = self._grammars.open(grammar, sent, ends, ready, failed)
        except NanoDeployError as error:
            failed(error)

    def cancel(self, slot: int, choice: int | None) -> None:
        """End a request or one choice of it; what is unknown or has ended is ignored."""
        request = self._by_slot.get(slot)
        if request is None:
            return
        for seq in request.sequences:
            if seq.phase is not Phase.ENDED and choice in (None, seq.choice):
                self._end(seq, FinishReason.CANCELLED, ())
        leader = request.sequences[0]
        if request.open_choices and leader.phase is Phase.ENDED and not leader.times.first_token:
            self._pass_lead(request)

    def fail(self, slot: int, error: NanoDeployError) -> None:
        """End a request with one failure."""
        request = self._by_slot.get(slot)
        if request is None:
            return
        for seq in request.sequences:
            self._scheduler.finish(seq)
        self._remove(slot)
        self._count(error.code)
        self._outbox.fail(slot, error)

    def broken(self, seq: Sequence, reason: str) -> None:
        """The model gave no numbers for `seq`: end its request with a failure.

        Its KV may hold none either, before the place that broke as well: a masked position counts 0 times what is
        there, and 0 times infinity is no number. So whoever begins as it did must not find that.
        """
        self._scheduler.forget(seq)
        self.fail(seq.slot, InternalError(reason))

    def expire(self) -> None:
        """Fail what ran out of time."""
        now = self._clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, slot = heapq.heappop(self._deadlines)
            self.fail(slot, DeadlineExceededError("the request ran out of time"))

    @property
    def next_deadline(self) -> float:
        return self._deadlines[0][0] if self._deadlines else math.inf

    def started(self, seq: Sequence, hit: PrefixHit) -> None:
        """Account for prompt tokens by source when a sequence is first computed here."""
        stats = seq.stats
        if seq.preemptions:
            return
        found = min(hit.num_tokens, seq.num_prompt)
        was_placed = bool(seq.times.scheduled)  # a hand-off failed: what it verified is found now, beside the cached
        cached = min(found, stats.cached_tokens) if was_placed else found
        seq.times.scheduled = seq.times.scheduled or self._clock.now()
        seq.stats = msgspec.structs.replace(
            stats,
            prompt_tokens=seq.num_prompt,
            cached_tokens=cached,
            transferred_tokens=found - cached,
            computed_tokens=seq.num_prompt - found,
        )

    def standing(self, seq: Sequence, token_ids: Tokens[int], drafts: Tokens[int]) -> tuple[int, FinishReason | None]:
        """How many of the tokens drawn for `seq` stand: the i-th if all drafts before it were right. And why the
        sequence ends with the last of them, None if it goes on.

        `token_ids[i]` was drawn behind `drafts[:i]`. None stands behind the one that ends the sequence.
        """
        num_output = seq.num_output
        for i, token_id in enumerate(token_ids):
            if seq.constraint is not None and token_id not in seq.stop_ids:
                seq.constraint.accept(token_id)
            reason = self._finish_reason(seq, token_id, num_output + i + 1)
            if reason is not None or i >= len(drafts) or drafts[i] != token_id:
                return i + 1, reason
        return len(token_ids), None

    def tokens(self, seq: Sequence, count: int, finish: FinishReason | None, logprobs: TokenLogprobs | None) -> None:
        """`count` tokens were appended: tell the router, and end the sequence if it ends with them."""
        token_ids = tuple(seq.token_ids[-count:])
        self.tokens_out += count
        if not seq.times.first_token:
            self._first_token(seq)
        if finish is None:
            delta = ChoiceDelta(
                choice=seq.choice, position=seq.num_output - count, token_ids=token_ids, logprobs=logprobs
            )
            self._outbox.delta(seq.slot, delta)
        else:
            self._end(seq, finish, token_ids, logprobs)

    def pooled(self, seq: Sequence, hidden_D: NDArray[np.float32]) -> None:
        """The whole prompt was computed: the request ends with its vector, made of the last token's row."""
        pooling, spec = seq.pooling, self._limits.pooling
        assert pooling is not None
        assert spec is not None
        vector_D = pooled_vector(hidden_D, pooling.dimensions, normalizes=spec.normalizes)
        if vector_D is None:
            self.broken(seq, "the model's hidden states are not finite numbers")
            return
        self._first_token(seq)
        self._end(seq, FinishReason.STOP, (), vector=vector_D.astype("<f4").tobytes())

    def take_prompt_logprobs(self, seq: Sequence, parts: Iterable[TokenLogprobs]) -> None:
        """Collect prompt logprobs chunk by chunk; they are sent once, complete."""
        seq.prompt_logprobs.extend(parts)

    def _first_token(self, seq: Sequence) -> None:
        now = self._clock.now()
        times = seq.times
        times.first_token = now
        request = self._by_slot[seq.slot]
        if seq is not request.sequences[0]:
            return
        times.prefilled = times.prefilled or now
        seq.stats = msgspec.structs.replace(
            seq.stats,
            queue_ms=(times.scheduled - times.submitted) * 1e3,
            prefill_ms=(times.prefilled - times.scheduled) * 1e3,
            decode_queue_ms=(now - times.prefilled) * 1e3,
            first_token_ms=(now - times.submitted) * 1e3,
        )
        self._outbox.stats(seq.slot, seq.stats)
        if seq.prompt_logprobs:
            self._send_prompt_logprobs(seq)
        self._start_siblings(request)

    def _start_siblings(self, request: Request) -> None:
        for sibling in request.sequences[1:]:
            if sibling.phase is Phase.HELD:
                self._scheduler.add(sibling)

    def _pass_lead(self, request: Request) -> None:
        """The choice that led ended before its prompt had KV: another one does it; the rest wait on."""
        if request.compiling is not None:
            return  # it is chosen when that is done
        heir = next(s for s in request.sequences if s.phase is Phase.HELD)
        request.sequences.remove(heir)
        request.sequences.insert(0, heir)
        heir.leads = True
        self._scheduler.add(heir)

    def _send_prompt_logprobs(self, seq: Sequence) -> None:
        whole = TokenLogprobs.join(seq.prompt_logprobs)
        self._outbox.prompt_logprobs(PromptLogprobsOf(seq.slot, whole))
        seq.prompt_logprobs.clear()

    def _finish_reason(self, seq: Sequence, token_id: int, num_output: int) -> FinishReason | None:
        """Why the sequence ends with `token_id` as its output token number `num_output`; None if it goes on."""
        if token_id in seq.stop_ids:
            return FinishReason.STOP
        if seq.constraint is not None and seq.constraint.ended:
            return FinishReason.STOP
        if num_output >= seq.sampling.max_tokens or seq.num_prompt + num_output >= self._limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...],
        logprobs: TokenLogprobs | None = None,
        vector: bytes = b"",
    ) -> None:
        self._scheduler.finish(seq)
        self._outbox.delta(
            seq.slot,
            ChoiceDelta(
                choice=seq.choice,
                position=seq.num_output - len(token_ids),
                token_ids=token_ids,
                finish=reason,
                stop_token_id=token_ids[-1] if token_ids and token_ids[-1] in seq.stop_ids else None,
                logprobs=logprobs,
                vector=vector,
            ),
        )
        self._count(reason.value)
        request = self._by_slot[seq.slot]
        if not request.open_choices:
            self._outbox.stats(seq.slot, _final_stats(request))
            self._remove(seq.slot)

    def _remove(self, slot: int) -> None:
        request = self._by_slot.pop(slot)
        if request.compiling is not None and self._grammars is not None:
            self._grammars.close(request.compiling)
        self._media.close(request.sequences[0].embeds)
        kept = self._deadlines
        if len(kept) > 2 * len(self._by_slot) + 64:
            self._deadlines = kept = [d for d in kept if d[1] in self._by_slot]
            heapq.heapify(kept)
        while kept and kept[0][1] not in self._by_slot:
            heapq.heappop(kept)

    def _count(self, end: str) -> None:
        self.finished[end] = self.finished.get(end, 0) + 1

    def _sequence(self, message: Submit, choice: int, deadline: float, *, leads: bool) -> Sequence:
        request = message.request
        params = request.sampling
        sent = request.sent[choice] if choice < len(request.sent) else ()
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._limits.eos_ids)
        seq = Sequence(
            seq_id=self.next_id(),
            slot=message.slot,
            choice=choice,
            label=request.request_id,
            token_ids=[*request.prompt_token_ids, *sent],
            num_prompt=len(request.prompt_token_ids),
            sampling=params,
            stop_ids=stop_ids,
            chain=[root_hash(self._limits.model_hash, request.adapter_id, request.cache_salt)],
            priority=request.priority,
            arrival=message.slot,
            deadline=deadline,
            remote_peer=message.prefill if leads and request.pooling is None else 0,
            leads=leads,
            phase=Phase.HELD,
            num_sent=len(sent),
            adapter_id=request.adapter_id,
            cache_salt=request.cache_salt,
            traceparent=request.traceparent,
            media=media_hashes(request.embeddings),
            pooling=request.pooling,
        )
        seq.times.submitted = self._clock.now()
        return seq


def _final_stats(request: Request) -> RequestStats:
    """The leader's waterfall with what all choices add up to."""
    paces = [s.pace for s in request.sequences if s.pace is not None]
    return msgspec.structs.replace(
        request.sequences[0].stats,
        preemptions=sum(s.preemptions for s in request.sequences),
        drafts=sum(p.num_drafts for p in paces),
        draft_tokens=sum(p.num_draft_tokens for p in paces),
        accepted_draft_tokens=sum(p.num_accepted_tokens for p in paces),
    )
