"""The reader's side of a hand-off, as the scheduler sees it: prompts whose KV a prefill worker supplies.

waiting --try_remote--> REMOTE --Done--> running, only the head is missing
`-Failed-> waiting, goes on here from what was verified

The hidden row of a prompt's last token is small and comes first: while the rest is on its way, `tails` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from common.config import HandoffConfig
from common.engine.scheduler import Scheduler
from common.engine.sequence import Phase, Sequence
from common.kvcache.manager import KVCacheManager, PrefixHit
from common.kvtransfer.session import Done, Failed, HandoffReader, OrderSpec, TailRead
from common.types import Clock


class Demand:
    """Places orders for sequences and brings their outcome back to the scheduler."""

    def __init__(
        self,
        reader: HandoffReader,
        cache: KVCacheManager,
        config: HandoffConfig,
        clock: Clock,
    ) -> None:
        self._reader = reader
        self._cache = cache
        self._config = config
        self._clock = clock
        self._placed: dict[int, Sequence] = {}
        self.tails: dict[int, Sequence] = {}  # REMOTE still, the last hidden row in the tail block
        self.on_lost_tail: Callable[[Sequence], None] = lambda seq: None  # before its block is given back
        self.fallbacks: dict[str, int] = {}
        self.local_by_choice = 0  # prompts short or cached enough to stay here

    def try_remote(self, seq: Sequence, hit: PrefixHit) -> bool:
        """Hand `seq` over if that is possible and worth it (see `Scheduler` for the verdicts)."""
        if seq.num_tokens - hit.num_tokens < self._config.min_remote_tokens or seq.wants_prompt_logprobs:
            self.local_by_choice += 1
            seq.remote_peer = 0
            return False
        if not self._reader.usable(seq.remote_peer):
            self._fall_back(seq, "peer not usable")
            return False
        self._cache.open(seq.seq_id, seq.label)
        if not self._has_room(seq, hit):
            self._cache.close(seq.seq_id)
            if not self._cache.could_reserve(seq.num_tokens, hit, fetch_to=seq.num_tokens):
                self._fall_back(seq, "more blocks at once than there are")  # a local prefill takes them bit by bit
            return False
        self._place(seq, hit.num_tokens)
        return True

    def _has_room(self, seq: Sequence, hit: PrefixHit) -> bool:
        """Blocks for all that comes: KV of every position, the states and the hidden row at the end."""
        seq_id, n = seq.seq_id, seq.num_tokens
        return (
            self._cache.reserve(seq_id, n, hit, fetch_to=n)
            and self._cache.snapshots.reserve_states(seq_id)
            and self._cache.snapshots.reserve_tail(seq_id) is not None
        )

    def _place(self, seq: Sequence, start: int) -> None:
        now = self._clock.now()
        seq.times.scheduled = now
        seq.num_computed = start
        cached = min(start, seq.num_prompt)
        seq.stats = msgspec.structs.replace(
            seq.stats,
            prompt_tokens=seq.num_prompt,
            cached_tokens=cached,
            transferred_tokens=seq.num_prompt - cached,
        )
        remaining_s = max(seq.deadline - now, 1e-3) if seq.deadline < math.inf else 0.0
        self._placed[seq.seq_id] = seq
        self._reader.place(
            OrderSpec(
                seq_id=seq.seq_id,
                peer=seq.remote_peer,
                request_id=seq.label,
                token_ids=tuple(seq.token_ids),
                chain=seq.chain,
                start_position=start,
                adapter_id=seq.adapter_id,
                cache_salt=seq.cache_salt,
                embeddings=seq.embeds.handles_at(now) if seq.embeds is not None else (),
                traceparent=seq.traceparent,
                priority=seq.priority,
                remaining_s=remaining_s,
            )
        )

    def cancel(self, seq: Sequence) -> None:
        """The sequence ended while its KV was on the way."""
        if self._placed.pop(seq.seq_id, None) is not None:
            self._reader.cancel(seq.seq_id)
        self._lose_tail(seq)

    def poll(self, scheduler: Scheduler) -> None:
        """Move sequences whose hand-off ended since the last call."""
        for placed in self._placed.values():
            placed.grow_chain()  # while its prompt is computed, so that nothing waits for it at the end
        for update in self._reader.poll():
            if isinstance(update, TailRead) and update.seq_id in self._placed:
                self.tails[update.seq_id] = self._placed[update.seq_id]
            if not isinstance(update, Done | Failed):
                continue
            seq = self._placed.pop(update.seq_id, None)
            if seq is None or seq.phase is not Phase.REMOTE:
                continue
            if isinstance(update, Done):
                self.tails.pop(seq.seq_id, None)
                seq.times.prefilled = self._clock.now()
                self._finish(seq, update)
                scheduler.remote_done(seq)
            else:
                self._lose_tail(seq)
                self._fall_back(seq, update.reason)
                scheduler.remote_failed(seq, update.num_verified)

    def _lose_tail(self, seq: Sequence) -> None:
        if self.tails.pop(seq.seq_id, None) is not None:
            self.on_lost_tail(seq)

    def _finish(self, seq: Sequence, done: Done) -> None:
        seconds = done.read_seconds
        seq.stats = msgspec.structs.replace(
            seq.stats,
            remote_cached_tokens=done.remote_cached_tokens,
            prefill_queue_ms=done.queue_ms,
            prefill_compute_ms=done.compute_ms,
            transfer_ms=done.wait_seconds * 1e3,
            transfer_bytes=done.nbytes,
            transfer_gbps=done.nbytes / seconds / 1e9 if seconds > 0 else 0.0,
            transport=done.transport,
            prefill_worker=done.worker_id,
        )
        seq.grow_chain()
        self._cache.advance(seq.seq_id, seq.chain, seq.num_tokens)

    def _fall_back(self, seq: Sequence, reason: str) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
        seq.remote_peer = 0
        seq.stats = msgspec.structs.replace(
            seq.stats, fallback=reason, transferred_tokens=0, prefill_worker="", computed_tokens=0
        )
