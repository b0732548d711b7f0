"""The board: seats of all workers, what this router has sent them, and the choice for each request.

    place(request) -> Ticket (counted) -> began: its prompt is computed -> end: over

A ticket's numbers leave the seats when they came: `end` may be called in any state and more than once. Loads are read
from the members at most every `REFRESH_S`; who is READY follows every change at once.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple, Protocol

import msgspec

from common.config.schema import RouterConfig
from common.errors import NotFoundError, UnavailableError
from common.rpc.membership import MembershipChange
from common.types import Clock, GenerationRequest, RequestStats, Role, WorkerInfo, WorkerRef, WorkerState
from common.types.prefix import LazyChain, root_hash
from services.router.routing.explain import explain
from services.router.routing.index import Popular, PrefixTable, Recall
from services.router.routing.policies import choose
from services.router.routing.view import DEFAULT_OUTPUT_TOKENS, Choice, Features, Seat, View, recent_means

REFRESH_S: Final = 0.05
MEMORY_S: Final = 20.0  # of recent work
SLACK_REQUESTS: Final = 2.0  # a seat may be so many requests ahead of the others
SHARED_BY: Final = 16.0  # sequences that share a decode step, as a rule
LEARN: Final = 0.1  # weight of one observation
FLYING_S: Final = 2.0  # from placing a prompt to its blocks being told, at most
REMEMBERED_S: Final = 60.0  # ... where nothing is told
HOT: Final = 4  # requests within `FLYING_S` or twice that make their common prefix a hot one
_RECALL_PIECES: Final = 65_536


class Members(Protocol):
    """The part of `common.rpc.membership.Membership` that the router uses."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]: ...

    def subscribe(self, listener: Callable[[MembershipChange], None]) -> None: ...


def serves(worker: WorkerInfo, model: str) -> bool:
    return worker.model.name == model or model in worker.model.served_names


class Hints(msgspec.Struct, frozen=True):
    """What a caller says besides the request. `session`: requests with the same one belong together."""

    session: str = ""
    explain: bool = False
    separate: bool = False


NO_HINTS: Final = Hints()


class Ticket:
    """One request on its pair of workers."""

    __slots__ = ("_board", "_over", "_tokens", "choice", "explained", "features", "has_begun")

    def __init__(self, board: Board, choice: Choice, features: Features) -> None:
        self._board = board
        self.has_begun = self._over = False
        self.choice = choice
        self.features = features
        self.explained: dict[str, object] | None = None
        computing, seat = choice.prefill or choice.decode, choice.decode
        prompt = self._uncached
        self._tokens = features.output_tokens + (prompt if computing is seat else 0)
        seat.own_requests += 1
        seat.own_tokens += self._tokens
        computing.own_prefill_tokens += prompt
        computing.own_prompt_tokens += features.prompt_tokens
        if computing is not seat:
            computing.own_requests += 1
            computing.own_tokens += prompt
        computing.recent_s += prompt / computing.prefill_rate
        seat.recent_s += features.output_tokens * seat.step_s / SHARED_BY

    @property
    def _uncached(self) -> int:
        return max(self.features.prompt_tokens - max(self.choice.decode_hit, self.choice.prefill_hit), 0)

    def began(self, stats: RequestStats | None) -> None:
        """The first token is there. Idempotent."""
        if self.has_begun or self._over:
            return
        self.has_begun = True
        computing, seat = self.choice.prefill or self.choice.decode, self.choice.decode
        computing.own_prefill_tokens -= self._uncached
        computing.own_prompt_tokens -= self.features.prompt_tokens
        if computing is not seat:
            computing.own_requests -= 1
            computing.own_tokens -= self._uncached
        if stats is not None:
            _learn(seat, computing, stats)

    def end(self, output_tokens: int) -> None:
        """It needs these workers no more. Idempotent."""
        if self._over:
            return
        self.began(None)
        self._over = True
        self.choice.decode.own_requests -= 1
        self.choice.decode.own_tokens -= self._tokens
        if output_tokens:  # what brought none says nothing of how long outputs are
            self._board.note_output(output_tokens)


def _learn(seat: Seat, computing: Seat, stats: RequestStats) -> None:
    """Speeds, where the workers' own reports do not have them."""
    if stats.transfer_gbps > 0 and stats.transfer_bytes:
        rate = stats.transferred_tokens * stats.transfer_gbps * 1e9 / stats.transfer_bytes
        seat.learned_transfer += LEARN * (rate - seat.learned_transfer) if seat.learned_transfer else rate
    computed = stats.computed_tokens or stats.transferred_tokens - stats.remote_cached_tokens
    busy_ms = stats.prefill_compute_ms or stats.prefill_ms  # a prefill worker's queue says nothing of its speed
    if busy_ms > 0 and computed >= 64:
        rate = computed / busy_ms * 1e3
        computing.learned_prefill += LEARN * (rate - computing.learned_prefill) if computing.learned_prefill else rate


class Board:
    """`rng` gives the seed of the board's own random source, which draws ties and samples."""

    def __init__(self, members: Members, config: RouterConfig, *, clock: Clock, rng: random.Random) -> None:
        self._members = members
        self._config = config
        self._clock = clock
        self._rng = random.Random(rng.getrandbits(64))
        self._seats: dict[WorkerRef, Seat] = {}
        self._views: dict[str, View] = {}
        self._stale = True  # views are to be made again
        self._refresh_s = self._decayed_s = clock.now()
        self._turn = 0
        self._output = float(DEFAULT_OUTPUT_TOKENS)
        self._flying = Recall(_RECALL_PIECES, FLYING_S)
        self._remembered = Recall(_RECALL_PIECES, REMEMBERED_S)
        self._popular = Popular(_RECALL_PIECES, FLYING_S, HOT)
        self.table = PrefixTable(config.prefix_index_blocks)
        members.subscribe(self._on_change)

    # -- requests --

    def place(self, request: GenerationRequest, hints: Hints = NO_HINTS, avoid: Collection[WorkerRef] = ()) -> Ticket:
        """Choose and count. Raises `NotFoundError` if no worker has the model, `UnavailableError` if none can now."""
        now = self._clock.now()
        view = self._view(request.model, now)
        known = self._prefixes(view, request, now)
        features = self._features(request, hints, known)
        try:
            choice = choose(view, features, self._rng, policy=self._config.policy, avoid=avoid)
        except UnavailableError:
            raise UnavailableError(f"No decode worker for model `{request.model}` is ready.") from None
        explained = explain(view, features, choice, self._config.policy) if hints.explain else None
        ticket = Ticket(self, choice, features)
        ticket.explained = explained
        self._remember(known.keys, choice, now)
        return ticket

    def _features(self, request: GenerationRequest, hints: Hints, known: _Known) -> Features:
        self._turn += 1
        sampling = request.sampling
        return Features(
            len(request.prompt_token_ids),
            max(int(min(sampling.max_tokens, self._output)), 1) * sampling.n,
            known.hits,
            _hash64(hints.session) if hints.session else 0,
            self._config.ttft_target_ms / 1e3,
            sampling.prompt_logprobs is None and request.pooling is None and not any(request.sent),
            self._turn,
            hints.separate or self._config.separation == "always",
            known.hot,
        )

    def note_output(self, tokens: int) -> None:
        self._output += 0.01 * (tokens - self._output)

    # -- prefixes --

    @property
    def by_prefix(self) -> bool:
        """Does the policy ask what workers have cached?"""
        return self._config.policy in _BY_PREFIX

    def _prefixes(self, view: View, request: GenerationRequest, now_s: float) -> _Known:
        if not self.by_prefix or not view.decode:
            return _NOTHING_KNOWN
        ids = request.prompt_token_ids
        model_hash = view.decode[0].worker.model.model_hash
        root = _root(model_hash, request.adapter_id, request.cache_salt)
        media = tuple([(e.position, e.media_hash) for e in request.embeddings])
        hits: list[tuple[int, int]] = []
        if len(self.table):
            chain = LazyChain(root, ids, media)
            hits = self.table.reach(chain, len(ids), view.block_sizes.items(), view.with_states)
        keys = [] if media else Recall.keys(root, ids)
        every = view.every_bit
        recalled = self._flying.reach(keys, len(ids), every, now_s)
        if blind := every & ~view.exact_bits:
            recalled += self._remembered.reach(keys, len(ids), blind, now_s)
        if recalled:
            hits = sorted([*hits, *recalled], reverse=True)
        return _Known(hits, keys, self._popular.note(keys, now_s))

    def _remember(self, keys: list[int], choice: Choice, now_s: float) -> None:
        if not keys:
            return
        seats = [choice.decode] if choice.prefill is None else [choice.decode, choice.prefill]
        self._flying.note(keys, sum(seat.bit for seat in seats), now_s)
        if blind := sum(seat.bit for seat in seats if not seat.exact):
            self._remembered.note(keys, blind, now_s)

    # -- workers --

    @property
    def num_exact(self) -> int:
        return sum(seat.exact for seat in self._seats.values())

    def seat(self, ref: WorkerRef) -> Seat | None:
        if self._stale:
            self._reseat(self._members.workers)
        return self._seats.get(ref)

    def renew(self, seat: Seat) -> None:
        """Forget what the table has of a worker."""
        self.table.give_up(seat.bit)
        seat.bit = self.table.take_bit()
        self._stale = True

    def set_exact(self, seat: Seat, exact: bool) -> None:
        if seat.exact is not exact:
            seat.exact = exact
            self._stale = True

    def note_states(self, seat: Seat) -> None:
        """Its hits end at cached states."""
        if not seat.has_states:
            seat.has_states = self._stale = True

    def _on_change(self, change: MembershipChange) -> None:
        self._stale = True

    def _view(self, model: str, now_s: float) -> View:
        if self._stale or now_s >= self._refresh_s:
            self._refresh(now_s)
        view = self._views.get(model)
        if view is None:
            raise NotFoundError(f"The model `{model}` does not exist.", param="model")
        return view

    def _refresh(self, now_s: float) -> None:
        """Take the loads, let recent work fade, and make the views again if somebody came, left or changed."""
        self._refresh_s = now_s + REFRESH_S
        fade = 2.0 ** ((self._decayed_s - now_s) / MEMORY_S)
        self._decayed_s = now_s
        workers = self._members.workers
        if self._stale:
            self._reseat(workers)
        for seat in self._seats.values():
            seat.recent_s *= fade
            worker = workers.get(seat.worker.ref.worker_id)
            if worker is not None and worker is not seat.worker and worker.ref == seat.worker.ref:
                seat.take(worker)
        if self._stale:
            self._views = self._make_views(workers)
            self._stale = False
        for view in self._views.values():
            view.recent_s = dict(recent_means(view))
            view.slack_s = SLACK_REQUESTS * _usual_work(view, self._output)
        self.table.sweep()

    def _reseat(self, workers: Mapping[str, WorkerInfo]) -> None:
        refs = {w.ref for w in workers.values() if w.role in (Role.DECODE, Role.PREFILL)}
        for ref in [ref for ref in self._seats if ref not in refs]:
            self.table.give_up(self._seats.pop(ref).bit)
        for worker in workers.values():
            if worker.ref in refs and worker.ref not in self._seats:
                self._seats[worker.ref] = Seat(worker, self.table.take_bit(), _hash64(worker.ref.worker_id))

    def _make_views(self, workers: Mapping[str, WorkerInfo]) -> dict[str, View]:
        views: dict[str, View] = {}
        seats = [seat for seat in self._seats.values() if seat.worker.ref.worker_id in workers]
        self._rng.shuffle(seats)
        for seat in seats:
            model = seat.worker.model
            for name in {model.name, *model.served_names}:
                view = views.setdefault(name, View())
                if seat.worker.state is WorkerState.READY:
                    view.add(seat)
        return views


_root = functools.lru_cache(maxsize=1024)(root_hash)


def _usual_work(view: View, output_tokens: float) -> float:
    if not view.decode:
        return 0.0
    seat = view.decode[0]
    return output_tokens * seat.step_s / SHARED_BY + 256 / seat.prefill_rate


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class _Known(NamedTuple):
    hits: list[tuple[int, int]]
    keys: list[int]
    hot: int = 0


_NOTHING_KNOWN: Final = _Known([], [])
_BY_PREFIX: Final = frozenset({"cost", "deadline", "prefix"})
