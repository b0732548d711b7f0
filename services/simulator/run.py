"""Runs a trace through a simulated cluster: events in order of virtual time, and what came of them.

    arrival -> board.place -> decode worker's scheduler -> steps -> first token -> last token
                                   `-> order -> prefill worker's steps -> read -> `

Loads reach the router as in a cluster, a moment after they were reported; cache changes as their batches do. Nothing
depends on the host's clock: the same trace and seed give the same numbers.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from common.config.schema import RouterConfig, RoutingPolicy
from common.engine.messages import EngineLoad, FromEngine, KvChanges
from common.engine.scheduler import StepPlan
from common.engine.sequence import Sequence as EngineSequence
from common.kvtransfer.session import Done, OrderSpec
from common.rpc.codec import ChangeKind
from common.rpc.membership import MembershipChange
from common.types import GenerationRequest, Role, SamplingParams, WorkerInfo, WorkerLoad
from common.types.prefix import root_hash
from services.router.routing.board import Board, Ticket
from services.router.routing.feed import Follower
from services.simulator.machine import MODEL, Machine, Profile
from services.simulator.trace import Tokens, TraceRequest, best_hit_rate

LOAD_DELAY_S = 0.2  # heartbeat -> controller -> watch


@dataclass(frozen=True)
class Cluster:
    num_decode: int = 8
    num_prefill: int = 0
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True)
class Outcome:
    """Of one policy. `spread`: the busiest worker's share over the mean, in seconds of steps; of each role."""

    policy: str
    num_requests: int
    hit_rate: float
    best_hit_rate: float
    ttft_s: tuple[float, float, float]  # p50, p90, p99
    total_s: tuple[float, float]  # p50, p99
    spread: Mapping[str, float]
    request_spread: Mapping[str, float]
    seconds: float  # of virtual time
    separated: float  # share of requests that a prefill worker took part in


class _VirtualClock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def now(self) -> float:
        return self.at_s


class _Members:
    """Membership without a controller."""

    def __init__(self) -> None:
        self.table: dict[str, WorkerInfo] = {}
        self.workers: Mapping[str, WorkerInfo] = MappingProxyType(self.table)

    def subscribe(self, listener: Callable[[MembershipChange], None]) -> None:
        for worker in self.table.values():
            listener(MembershipChange(ChangeKind.ADDED, worker))


@dataclass(slots=True)
class _Open:
    """A request under way."""

    request: TraceRequest
    ticket: Ticket
    first_s: float = 0.0


class Simulation:
    """One run of one policy; `run` once."""

    def __init__(self, cluster: Cluster, policy: RoutingPolicy, requests: Sequence[TraceRequest], seed: int) -> None:
        self._requests = requests
        self._policy = policy
        self._clock = _VirtualClock()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._seq_ids = itertools.count(1)
        self._open: dict[int, _Open] = {}
        self._reading: dict[int, tuple[Machine, OrderSpec]] = {}  # a prefill worker's sequence -> whose it is
        self._ttft_s: list[float] = []
        self._total_s: list[float] = []
        self._hit_tokens = self._num_separated = 0
        members = self._members = _Members()
        roles = [Role.DECODE] * cluster.num_decode + [Role.PREFILL] * cluster.num_prefill
        self._machines: dict[str, Machine] = {}
        self._by_key: dict[int, Machine] = {}
        for key, role in enumerate(roles, 1):
            machine = Machine(f"{role.value}-{key}", role, key, cluster.profile, self._clock, self._take_order)
            self._machines[machine.name] = self._by_key[key] = machine
            members.table[machine.name] = machine.info(WorkerLoad())
        config = RouterConfig(policy=policy, prefix_index_blocks=50_000_000)
        self._board = Board(members, config, clock=self._clock, rng=random.Random(seed))
        self._followers = {name: Follower(self._board, info.ref) for name, info in members.table.items()}
        for name, machine in self._machines.items():
            for part in machine.feed.snapshot():
                self._followers[name].apply(part)
        self._tokens = Tokens(root_hash(MODEL.model_hash))

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """As the router last heard of them."""
        return self._members.workers

    def run(self) -> Outcome:
        for number, request in enumerate(self._requests):
            self._at(request.at_s, lambda n=number, r=request: self._arrive(n, r))  # type: ignore[misc]
        while self._events:
            self._clock.at_s, _, act = heapq.heappop(self._events)
            act()
        assert not self._open, f"{len(self._open)} requests never ended"
        return self._outcome()

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    # -- requests --

    def _arrive(self, number: int, request: TraceRequest) -> None:
        token_ids = self._tokens.of(request)
        ticket = self._board.place(
            GenerationRequest(
                request_id=str(number),
                model=MODEL.name,
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=request.output_tokens),
            )
        )
        choice, seq_id = ticket.choice, next(self._seq_ids)
        self._open[seq_id] = _Open(request, ticket)
        machine = self._machines[choice.decode.worker.ref.worker_id]
        peer = self._machines[choice.prefill.worker.ref.worker_id].key if choice.prefill is not None else 0
        chain = self._tokens.chain(request, token_ids)
        machine.submit(seq_id, list(token_ids), chain, request.output_tokens, peer)
        self._step(machine)

    def _take_order(self, reader: Machine, spec: OrderSpec) -> None:
        """To the prefill worker that the request's router named."""
        machine, seq_id = self._by_key[spec.peer], next(self._seq_ids)
        self._reading[seq_id] = (reader, spec)
        self._num_separated += 1

        def arrive() -> None:
            machine.take_order(seq_id, spec)
            self._step(machine)

        self._at(self._clock.at_s + machine.profile.handoff_s / 2, arrive)

    def _computed(self, machine: Machine, seq: EngineSequence) -> None:
        """A prefill worker is through with an order: its last part is read, the others were before."""
        reader, spec = self._reading.pop(seq.seq_id)
        missing = seq.num_prompt - spec.start_position
        last = min(missing, machine.profile.max_num_batched_tokens)
        own = max(machine.hits.pop(seq.seq_id, 0) - spec.start_position, 0)
        self._hit_tokens += own + spec.start_position
        read_s = machine.profile.handoff_s / 2 + last / machine.profile.transfer_tokens_per_s

        def arrive() -> None:
            reader.reads.done(
                Done(
                    seq_id=spec.seq_id,
                    nbytes=missing * 1000,
                    remote_cached_tokens=own,
                    wait_seconds=read_s,
                    read_seconds=missing / machine.profile.transfer_tokens_per_s,
                    transport="simulated",
                    worker_id=machine.name,
                    queue_ms=0.0,
                    compute_ms=0.0,
                )
            )
            self._step(reader)

        self._at(self._clock.at_s + read_s, arrive)

    # -- steps --

    def _step(self, machine: Machine) -> None:
        if machine.is_stepping:
            return
        begun = machine.begin_step()
        if begun is None:
            self._tell(machine)
            return
        plan, seconds = begun
        machine.is_stepping, launched_s = True, self._clock.at_s
        self._at(launched_s + seconds, lambda: self._end_step(machine, plan, launched_s))

    def _end_step(self, machine: Machine, plan: StepPlan, launched_s: float) -> None:
        machine.is_stepping = False
        first, over = machine.end_step(plan, launched_s)
        for seq in first:
            found = self._open[seq.seq_id]
            found.first_s = self._clock.at_s
            found.ticket.began(seq.stats)
            self._ttft_s.append(self._clock.at_s - found.request.at_s)
        for seq in over:
            if seq.order is not None:
                self._computed(machine, seq)
                continue
            found = self._open.pop(seq.seq_id)
            found.ticket.end(seq.num_output)
            self._total_s.append(self._clock.at_s - found.request.at_s)
            self._hit_tokens += machine.hits.pop(seq.seq_id, 0)
        self._tell(machine)
        self._step(machine)

    def _tell(self, machine: Machine) -> None:
        for message in machine.report():
            self._told(machine, message)

    def _told(self, machine: Machine, message: FromEngine) -> None:
        if isinstance(message, KvChanges):
            batch = machine.feed.take(message)
            if batch is not None:
                self._followers[machine.name].apply(batch)
        elif isinstance(message, EngineLoad):
            info = machine.info(message.load)
            self._at(self._clock.at_s + LOAD_DELAY_S, lambda: self._members.table.update({machine.name: info}))

    # -- outcome --

    def _outcome(self) -> Outcome:
        ttft, total = sorted(self._ttft_s), sorted(self._total_s)
        roles = sorted({machine.role.value for machine in self._machines.values()})
        prompt = sum(request.input_tokens for request in self._requests)
        return Outcome(
            policy=self._policy,
            num_requests=len(total),
            hit_rate=self._hit_tokens / prompt,
            best_hit_rate=best_hit_rate(self._requests),
            ttft_s=(quantile(ttft, 0.5), quantile(ttft, 0.9), quantile(ttft, 0.99)),
            total_s=(quantile(total, 0.5), quantile(total, 0.99)),
            spread={role: self._spread(role, lambda m: m.busy_s) for role in roles},
            request_spread={role: self._spread(role, lambda m: m.num_requests) for role in roles},
            seconds=self._clock.at_s,
            separated=self._num_separated / max(len(total), 1),
        )

    def _spread(self, role: str, load: Callable[[Machine], float]) -> float:
        loads = [load(machine) for machine in self._machines.values() if machine.role.value == role]
        return max(loads) * len(loads) / max(sum(loads), 1e-9)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in order: the smallest that is not below `share` of them."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def simulate(cluster: Cluster, policy: RoutingPolicy, requests: Sequence[TraceRequest], seed: int = 0) -> Outcome:
    return Simulation(cluster, policy, requests, seed).run()
