"""Makes an engine for a config: model, cache, transport, scheduler, and the self-test that says it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.config import WorkerConfig
from common.engine.compute import Compute, Progress, digest_launcher, make_compute
from common.engine.counters import EngineCounters
from common.engine.demand import Demand
from common.engine.drafting import Drafting, DraftModel
from common.engine.engine import Engine
from common.engine.load import LoadMeter
from common.engine.media import Media, MediaSource
from common.engine.messages import EngineReady
from common.engine.outbox import Outbox
from common.engine.parts import EngineParts
from common.engine.rank import Fleet, ProcessRanks, RankStarter, rank_device, start_ranks
from common.engine.rank_drafts import RankedDrafts
from common.engine.rank_runner import RankedDigests, RankedRunner, Runner
from common.engine.request_checks import ModelLimits
from common.engine.requests import Requests
from common.engine.runner import ModelRunner
from common.engine.scheduler import Propose, Scheduler, SchedulerLimits
from common.engine.selftest import self_test
from common.engine.sequence import Sequence
from common.engine.sizing import EngineSizing, busy_tokens, resolve_engine
from common.engine.speculative import MadeAhead, Speculator, make_speculator
from common.engine.structured import GrammarPool
from common.engine.structured_masks import StepMasks
from common.engine.supply import Supply, SupplyParts
from common.kvcache.layout import FULL_GROUP, KVLayout
from common.kvcache.manager import KVCacheManager, PrefixHit
from common.kvtransfer.digester import digest
from common.kvtransfer.leases import Leases
from common.kvtransfer.publish import Publisher
from common.kvtransfer.rank_reads import RankedReads
from common.kvtransfer.reads import RankReads, Reads
from common.kvtransfer.session import HandoffReader
from common.kvtransfer.transport import Endpoint, Transport
from common.parallel.mesh import Mesh, alone
from common.types import Clock, Role


@dataclass(frozen=True)
class Drafter:
    """Who drafts: `runner` is None for a model without a multi-token-prediction layer, or where it is not used."""

    speculator: Speculator | None
    runner: DraftModel | None

    def drafting(self, cache: KVCacheManager, layout: KVLayout) -> Drafting | None:
        if self.runner is None:
            return None
        made_ahead = self.speculator if isinstance(self.speculator, MadeAhead) else None
        return Drafting(self.runner, cache, layout.group(FULL_GROUP).block_size, made_ahead)


@dataclass(frozen=True)
class BuiltEngine:
    engine: Engine
    ready: EngineReady
    parts: EngineParts
    compute: Compute
    clock: Clock
    fleet: Fleet | None = None

    @property
    def transport(self) -> Transport:
        return self.compute.transport

    @property
    def wakeup_fds(self) -> tuple[int, ...]:
        """Readable when a step has something to find."""
        grammars = self.parts.grammars
        own = (self.transport.wakeup_fd, *((grammars.wakeup_fd,) if grammars is not None else ()))
        if self.fleet is None:
            return own
        return *own, self.fleet.ranks.wakeup_fd, *(link.fileno() for link in self.fleet.reads)

    def check(self) -> None:
        """`RankLostError` if the engine cannot go on."""
        if self.fleet is not None:
            self.fleet.ranks.check()

    def close(self) -> None:
        self.parts.masks.close()
        if self.parts.grammars is not None:
            self.parts.grammars.shutdown()
        self.compute.forget_steps()
        if self.fleet is not None:
            self.fleet.close()
        self.transport.close()


def build_engine(
    config: WorkerConfig,
    role: Role,
    clock: Clock,
    progress: Progress,
    transport: Transport | None = None,
    media: MediaSource | None = None,
    ranks: RankStarter | None = None,
) -> BuiltEngine:
    """Load the model and put an engine together; it has passed its self-test on return.

    Raises ConfigError for a bad checkpoint or setting. `transport` is given in tests that join engines. `media`: where
    image embeddings come from; without it requests with images are refused. `ranks`: what other ranks run in,
    processes of their own by default.
    """
    engine = resolve_engine(config.engine, role)
    config = config.model_copy(update={"engine": engine})
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    fleet = start_ranks(config, role, ranks or ProcessRanks()) if engine.tensor_parallel_size > 1 else None
    mesh = fleet.mesh if fleet is not None else alone(rank_device(engine, 0))
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
    try:
        return _build(config, role, clock, progress, transport, media, mesh, fleet)
    except BaseException:
        if fleet is not None:
            fleet.close()
        raise


def _build(
    config: WorkerConfig,
    role: Role,
    clock: Clock,
    progress: Progress,
    transport: Transport | None,
    media: MediaSource | None,
    mesh: Mesh,
    fleet: Fleet | None,
) -> BuiltEngine:
    engine = config.engine
    compute = make_compute(config, role, mesh, clock, progress, transport)
    sizing, layout, transport, bases = compute.sizing, compute.layout, compute.transport, compute.bases
    spec, max_model_len = sizing.spec, sizing.max_model_len
    runner: Runner = compute.runner
    reads: Reads = (own := RankReads(layout, bases, transport))
    endpoints: tuple[Endpoint, ...] = (transport.endpoint(),)
    others = None
    if fleet is not None:
        endpoints = fleet.meet(transport.endpoint())
        runner, others = RankedRunner(compute.runner, fleet.ranks), RankedDigests(fleet.ranks)
        reads = RankedReads(own, fleet.reads, lambda: fleet.ranks.num_orders)
    digest_ahead = digest_launcher(mesh.device) if mesh.device.type == "cuda" or fleet is not None else None
    limits = ModelLimits(
        model_hash=spec.model_hash,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_ids=frozenset(spec.eos_token_ids),
        max_waiting_seqs=engine.max_waiting_seqs,
        max_num_seqs=engine.max_num_seqs,
        pooling=spec.pooling,
    )
    images = Media(spec.media, spec.hidden_size, media, clock)
    drafts: DraftModel | None = compute.draft_runner
    if fleet is not None and compute.draft_runner is not None:
        drafts = RankedDrafts(compute.draft_runner, fleet.ranks)
    drafter = Drafter(_speculator(config, sizing, role), drafts)
    make_publisher = partial(Publisher, layout, bases, digest=digest, launcher=digest_ahead, others=others)
    busy = busy_tokens(spec)
    parts = assemble(config, role, layout, limits, runner, reads, make_publisher, images, clock, drafter, busy)
    can_read = mesh.device.type == "cpu" or transport.name != "memory"  # which copies on the host
    if role is Role.DECODE and can_read and parts.beside is not None and spec.pooling is None:
        compute.record_head()
    progress("self-test", 0, 1)
    built = Engine(parts)
    fds = [transport.wakeup_fd, *(link.fileno() for link in (fleet.reads if fleet is not None else ()))]
    self_test(built, parts, reads if can_read else None, endpoints, fds, max_model_len)
    ready = EngineReady(
        layout=layout,
        endpoints=endpoints,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        architecture=spec.model_type,
        dtype=sizing.dtype,
        device=str(mesh.device),
        lease_ttl_s=engine.lease_ttl_s,
        pid=os.getpid(),
        embedding_size=spec.pooling.size if spec.pooling is not None else 0,
    )
    return BuiltEngine(built, ready, parts, compute, clock, fleet)


def assemble(
    config: WorkerConfig,
    role: Role,
    layout: KVLayout,
    limits: ModelLimits,
    runner: Runner,
    reads: Reads,
    make_publisher: Callable[[KVCacheManager], Publisher],
    media: Media,
    clock: Clock,
    drafter: Drafter,
    busy: int,
) -> EngineParts:
    """Join the parts around a runner and what reads from others. `busy`: see `SchedulerLimits.busy_tokens`."""
    engine = config.engine
    outbox = Outbox()
    caching = engine.enable_prefix_caching
    cache = KVCacheManager(layout, clock, enable_prefix_caching=caching, record_events=caching)
    scheduler_limits = SchedulerLimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.state_snapshot_interval, limits.max_model_len, busy
    )
    scheduler = Scheduler(cache, scheduler_limits, clock)
    grammars = None
    if role is Role.DECODE:
        grammars = GrammarPool(Path(engine.model), limits.vocab_size, limits.eos_ids, clock)
    requests = Requests(limits, scheduler, media, outbox, clock, grammars)
    reader = HandoffReader(layout, reads, cache, clock, config.handoff, outbox.send)
    demand = Demand(reader, cache, config.handoff, clock)
    leases = Leases(cache, clock, engine.lease_ttl_s)
    publisher = make_publisher(cache)
    supply = Supply(SupplyParts(limits, scheduler, media, leases, publisher, outbox, clock), requests.next_id)
    speculator, drafting = drafter.speculator, drafter.drafting(cache, layout)
    overlap, has_drafts = engine.async_scheduling == "on", speculator is not None or drafting is not None

    counted = EngineCounters(requests, cache, reader, demand, leases, supply, speculator, grammars)
    main_group = layout.groups[0].name
    meter = LoadMeter(scheduler, cache, main_group, outbox, clock, counted.values, counted.traffic, counted.labelled)

    def started(seq: Sequence, hit: PrefixHit) -> None:
        (requests if seq.order is None else supply).started(seq, hit)

    scheduler.connect(demand.try_remote, demand.cancel, started, _proposer(speculator) if speculator else None)
    return EngineParts(
        layout=layout,
        cache=cache,
        scheduler=scheduler,
        requests=requests,
        media=media,
        demand=demand,
        reader=reader,
        supply=supply,
        runner=runner,
        outbox=outbox,
        meter=meter,
        clock=clock,
        masks=StepMasks(grammars.vocabulary if grammars is not None else None),
        grammars=grammars,
        speculator=speculator,
        drafting=drafting,
        check_ledger=engine.check_ledger,
        overlap=overlap,
        beside=runner if overlap and not has_drafts and isinstance(runner, ModelRunner) else None,
    )


def _proposer(speculator: Speculator) -> Propose:
    """Drafts up to the first that a sequence's grammar does not allow."""

    def propose(seq: Sequence, room: int, num_sequences: int) -> tuple[int, ...]:
        drafts = speculator.propose(seq, room, num_sequences)
        return drafts if seq.constraint is None else drafts[: seq.constraint.allows(drafts)]

    return propose


def _speculator(config: WorkerConfig, sizing: EngineSizing, role: Role) -> Speculator | None:
    if role is not Role.DECODE:
        return None
    return make_speculator(
        config.engine.speculative_config,
        num_layers=sizing.spec.num_layers,
        vocab_size=sizing.spec.vocab_size,
        max_model_len=sizing.max_model_len,
    )
