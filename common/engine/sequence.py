"""A sequence: tokens, how many of them have KV, and why it runs.

    WAITING -> RUNNING -> ENDED                  computed here
    WAITING -> REMOTE -> RUNNING -> ENDED        prompt KV read from a prefill worker
               REMOTE -> WAITING                 the hand-off failed: go on from what was verified
               RUNNING -> WAITING                preempted: blocks given back, recomputed later
    HELD -> WAITING                              a further choice of n, until the one that leads has its prompt KV

One rule moves them all: each step closes part of the gap between `num_computed` and `num_tokens`. While a step is
under way the next one may be planned: positions that it computes count as computed then (`num_scheduled`), and the
token that it draws as one that is there (`num_expected`), though nobody knows it yet. A sequence that ends meanwhile
keeps its blocks until the steps it is in are over.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.engine.media import MediaEmbeds
from common.engine.pace import Pace
from common.types import GenerationRequest, Pooling, RequestStats, SamplingParams, TokenLogprobs
from common.types.prefix import UNIT, extend_chain, hash_at

if TYPE_CHECKING:
    from common.engine.constraint import Constraint
    from common.engine.structured import Ticket


class Phase(enum.Enum):
    HELD = "held"
    WAITING = "waiting"
    REMOTE = "remote"
    RUNNING = "running"
    ENDED = "ended"


@dataclass
class OrderState:
    """A sequence that computes KV for a reader and publishes it instead of generating."""

    reader: int
    order_id: int
    start_position: int
    accepted_at: float
    lease_id: int = 0
    num_published: int = 0  # positions below this are out
    started_at: float = 0.0


@dataclass
class Times:
    """Instants on the engine's clock, 0 when not reached."""

    submitted: float = 0.0
    scheduled: float = 0.0
    prefilled: float = 0.0
    first_token: float = 0.0


@dataclass(eq=False)
class Sequence:
    seq_id: int
    slot: int  # request it belongs to; 0 for orders
    choice: int
    label: str  # owner shown in the ledger
    token_ids: list[int]
    num_prompt: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    chain: list[bytes]
    priority: int
    arrival: int
    deadline: float  # engine clock, inf for none
    media: tuple[tuple[int, bytes], ...] = ()  # (position, hash) of its images
    embeds: MediaEmbeds | None = None  # the images themselves
    adapter_id: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    remote_peer: int = 0
    leads: bool = True  # brings its request the prompt's KV and logprobs; the other choices wait for it
    order: OrderState | None = None
    pooling: Pooling | None = None  # its vector is wanted, and no token
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    steps_under_way: int = 0
    num_launched: int = 0  # positions behind `num_computed` that steps under way compute
    num_pending: int = 0  # tokens that a step under way draws
    pending_sample: int = -1  # which of that step's draws
    constraint: Constraint | None = None  # what its grammar allows next
    num_sent: int = 0  # output tokens the client already had (resume)
    tail_ready: bool = False  # the last hidden row lies in the tail block: only the head is missing
    first_under_way: bool = False  # its first token is drawn beside the steps: none may have it until that is there
    preemptions: int = 0
    pace: Pace | None = None  # of its drafts, once it has had a chance of some
    drafts: tuple[int, ...] = ()  # made ahead, for the next step
    num_drafted: int = 0  # positions below it that a draft layer has a row of, or never will have
    checkpoints: tuple[int, ...] = ()  # positions at which its state is cached, ascending; steps end there
    times: Times = field(default_factory=Times)
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def gap(self) -> int:
        """Tokens whose KV is missing."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_scheduled(self) -> int:
        """Positions that are computed when the steps under way are over."""
        return self.num_computed + self.num_launched

    @property
    def num_expected(self) -> int:
        """Tokens when the steps under way are over, if none of them ends the sequence."""
        return len(self.token_ids) + self.num_pending

    @property
    def awaits_media(self) -> bool:
        """Are rows of its images still to come? It cannot be computed here before."""
        return self.embeds is not None and not self.embeds.ready

    def grow_chain(self, num_tokens: int | None = None) -> None:
        """Hash the whole units of all tokens known so far, or of the first `num_tokens`."""
        if len(self.token_ids) // UNIT < len(self.chain):
            return  # they are
        extend_chain(self.chain, self.token_ids, self.media, num_tokens)

    def prefix_hash(self, num_tokens: int) -> bytes:
        return hash_at(self.chain, self.token_ids, num_tokens, self.media)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Are they still to be computed? A resumed sequence has had them."""
        return self.sampling.prompt_logprobs is not None and self.leads and not self.num_output


@dataclass(eq=False)
class Request:
    """A request in an engine: its sequences, one per choice, the one that leads first."""

    slot: int
    request: GenerationRequest
    sequences: list[Sequence]
    stats_sent: bool = False
    compiling: Ticket | None = None  # its grammar: nothing of it is scheduled before that is done

    @property
    def open_choices(self) -> int:
        return sum(s.phase is not Phase.ENDED for s in self.sequences)
