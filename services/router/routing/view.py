"""What a choice is made from: plain data that policies read and only the board writes.

Times are seconds, speeds tokens per second. A *seat* is one worker as this router sees it; a *view* holds the seats
that can take a request for one model now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from common.types import Role, WorkerInfo

DEFAULT_OUTPUT_TOKENS = 128


class Speed(NamedTuple):
    """What a worker does in a second, before anybody has measured it."""

    prefill: float  # prompt tokens/s
    step_s: float  # one decode step
    transfer: float  # prompt tokens/s whose KV it reads from another


NEW = 0.3  # weight of the newest report
SPEED_NEW = 0.05

ON_CPU = Speed(2_000.0, 0.02, 50_000.0)
ON_GPU = Speed(20_000.0, 0.015, 200_000.0)


class Seat:
    """One worker. `own_` numbers are this router's, and exact. What a worker reports is a second or two old and has
    them in it: `other_` numbers are what it reports beyond them, as a fading mean, since the two never quite meet.
    """

    __slots__ = (
        "_rate",
        "_step_s",
        "bit",
        "exact",
        "has_states",
        "kv_tokens_free",
        "learned_prefill",
        "learned_transfer",
        "min_remote_tokens",
        "other_requests",
        "other_tokens",
        "own_prefill_tokens",
        "own_prompt_tokens",
        "own_requests",
        "own_tokens",
        "prefill_rate",
        "recent_s",
        "salt",
        "slots",
        "step_s",
        "transfer_rate",
        "worker",
    )

    def __init__(self, worker: WorkerInfo, bit: int = 0, salt: int = 0) -> None:
        self.bit = bit  # its place in the masks of prefix hits
        self.salt = salt  # for rendezvous hashing
        self.exact = False  # is the prefix index of it exact?
        self.has_states = False  # do its prefix hits end at cached states?
        self.own_requests = 0  # sent here and not over
        self.own_prefill_tokens = 0  # prompt tokens to compute here, of requests without a token yet
        self.own_prompt_tokens = 0  # the same with what is cached, which workers count too until they begin
        self.own_tokens = 0  # tokens to compute and to make of `own_requests`
        self.recent_s = 0.0  # work sent here, decaying
        self.learned_prefill = 0.0
        self.learned_transfer = 0.0
        self._rate = self._step_s = 0.0
        self.other_requests = float(worker.load.running + worker.load.waiting)
        self.other_tokens = float(worker.load.waiting_tokens)
        self.take(worker)

    def take(self, worker: WorkerInfo) -> None:
        """What the worker says of itself now."""
        load = worker.load
        self.worker = worker
        self.other_requests += NEW * (load.running + load.waiting - self.own_requests - self.other_requests)
        self.other_tokens += NEW * (load.waiting_tokens - self.own_prompt_tokens - self.other_tokens)
        self.slots = worker.max_num_seqs or 64
        self.min_remote_tokens = worker.min_remote_tokens
        blocks = load.kv_blocks_available if load.kv_blocks_total else 1 << 40
        self.kv_tokens_free = blocks * max(worker.kv_block_size, 1)
        default = ON_CPU if worker.device == "cpu" else ON_GPU
        self._rate = _faded(self._rate, load.prefill_tokens_per_s)
        self._step_s = _faded(self._step_s, load.decode_step_ms / 1e3)
        self.prefill_rate = self._rate or self.learned_prefill or default.prefill
        self.step_s = self._step_s or default.step_s
        self.transfer_rate = self.learned_transfer or default.transfer

    @property
    def open_requests(self) -> float:
        """What other routers sent is counted too."""
        return self.own_requests + max(self.other_requests, 0.0)

    @property
    def queue_tokens(self) -> float:
        """Prompt tokens in line before a new one."""
        return self.own_prefill_tokens + max(self.other_tokens, 0.0)

    @property
    def open_tokens(self) -> float:
        return self.own_tokens + max(self.other_tokens, 0.0)


def _faded(mean: float, value: float) -> float:
    """A speed changes with every batch; what it is as a rule is wanted."""
    return mean + SPEED_NEW * (value - mean) if mean and value else mean or value


@dataclass
class View:
    """Seats that are READY for one model. `prefill` is by the model's hash; lists are in a random order."""

    decode: list[Seat] = field(default_factory=list)
    prefill: dict[bytes, list[Seat]] = field(default_factory=dict)
    by_bit: dict[int, Seat] = field(default_factory=dict)
    block_sizes: dict[int, int] = field(default_factory=dict)  # tokens -> mask of the seats that have it
    with_states: int = 0  # mask of seats whose hits end at a cached state
    every_bit: int = 0
    model_hashes: set[bytes] = field(default_factory=set)  # of the decode seats
    exact_bits: int = 0
    recent_s: dict[Role, float] = field(default_factory=dict)  # mean `recent_s` of a role's seats
    slack_s: float = 0.0  # so much more than its share is no imbalance yet

    def add(self, seat: Seat) -> None:
        worker, bit = seat.worker, seat.bit
        if worker.role is Role.DECODE:
            self.decode.append(seat)
            self.model_hashes.add(worker.model.model_hash)
        else:
            self.prefill.setdefault(worker.model.model_hash, []).append(seat)
        self.by_bit[bit] = seat
        size = max(worker.kv_block_size, 16)
        self.block_sizes[size] = self.block_sizes.get(size, 0) | bit
        self.every_bit |= bit
        self.exact_bits |= bit if seat.exact else 0
        self.with_states |= bit if seat.has_states else 0

    def limit_s(self, role: Role) -> float:
        """`recent_s` above which a seat is left out where others are not."""
        return SPREAD * self.recent_s.get(role, 0.0) + self.slack_s


SPREAD = 1.2  # of the mean: most that a seat may have had of late


class Features(msgspec.Struct, frozen=True):
    """What the choice may depend on besides the workers.

    `hits`: (tokens, mask of seats that hold the first so many), longest first; a seat counts where it is met first.
    `session`: a hash of the caller's key, 0 for none. `remote`: may another worker prefill it? `separate`: must it,
    where there is one? `turn`: of round robin. `hot`: so many tokens at its beginning many others had of late.
    """

    prompt_tokens: int
    output_tokens: int = DEFAULT_OUTPUT_TOKENS
    hits: Sequence[tuple[int, int]] = ()
    session: int = 0
    ttft_s: float = 1.0
    remote: bool = True
    turn: int = 0
    separate: bool = False
    hot: int = 0


class Terms(NamedTuple):
    """Where the predicted time goes, in seconds. `decode_s` also holds what stands for lack of room and for spread,
    `others_s` is what others wait for it.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    others_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s + self.transfer_s

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s + self.others_s


class Choice(NamedTuple):
    """`prefill` None: the decode worker does it. The hits are what the two hold of the prompt, in tokens."""

    decode: Seat
    prefill: Seat | None
    decode_hit: int
    prefill_hit: int


def hit_of(hits: Sequence[tuple[int, int]], bit: int) -> int:
    for tokens, mask in hits:
        if mask & bit:
            return tokens
    return 0


def recent_means(view: View) -> Mapping[Role, float]:
    """Mean recent work of a role's seats."""
    prefill = [seat for seats in view.prefill.values() for seat in seats]
    found = {Role.DECODE: view.decode, Role.PREFILL: prefill}
    return {role: sum(s.recent_s for s in seats) / len(seats) for role, seats in found.items() if seats}
