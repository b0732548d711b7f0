"""Makes an engine for a config: model, cache, transport, scheduler, and the self-test that says it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.attention.capability import Needs
from common.attention.context import AttentionBackend
from common.attention.select import choose
from common.config import EngineConfig, WorkerConfig
from common.engine.counters import EngineCounters
from common.engine.demand import Demand
from common.engine.draft_runner import DraftRunner
from common.engine.drafting import Drafting
from common.engine.engine import Engine, EngineParts
from common.engine.gpu_memory import measure, run_largest_step, weights_nbytes
from common.engine.graphs import DecodeGraphs, GraphShape, graph_sizes
from common.engine.load import LoadMeter
from common.engine.media import Media, MediaSource
from common.engine.messages import EngineReady
from common.engine.outbox import Outbox
from common.engine.requests import ModelLimits, Requests
from common.engine.runner import ModelRunner
from common.engine.sampler import Sampler
from common.engine.scheduler import Scheduler, SchedulerLimits
from common.engine.selftest import self_test
from common.engine.sequence import Sequence
from common.engine.sizing import EngineSizing, resolve_engine, size_engine
from common.engine.speculative import MadeAhead, Speculator, make_speculator
from common.engine.supply import Supply, SupplyParts
from common.errors import ConfigError
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, KVLayout, Retention
from common.kvcache.manager import KVCacheManager, PrefixHit
from common.kvcache.pool import KVPool
from common.kvtransfer.digester import digest
from common.kvtransfer.leases import Leases
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport
from common.kvtransfer.publish import Publisher
from common.kvtransfer.session import HandoffReader
from common.kvtransfer.transport import Transport
from common.kvtransfer.ucx import UcxTransport
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec
from common.models.weights import load_model
from common.telemetry import get_logger
from common.types import Clock, Role

log = get_logger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drafter:
    """Who drafts: `runner` is None for a model without a multi-token-prediction layer, or where it is not used."""

    speculator: Speculator | None
    runner: DraftRunner | None

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
    transport: Transport
    clock: Clock

    @property
    def wakeup_fd(self) -> int:
        return self.transport.wakeup_fd

    def close(self) -> None:
        self.transport.close()


def make_transport(config: WorkerConfig, clock: Clock) -> Transport:
    """The first configured transport. ConfigError names one that does not exist."""
    name = config.handoff.transports[0] if config.handoff.transports else "memory"
    if name == "ucx":
        return UcxTransport(config.ucx)
    if name == "memory":
        return MemoryTransport(MemoryNetwork(clock), digest)
    raise ConfigError(f"handoff.transports: unknown transport {name!r}; there are ucx and memory")


def build_engine(
    config: WorkerConfig,
    role: Role,
    clock: Clock,
    progress: Progress,
    transport: Transport | None = None,
    media: MediaSource | None = None,
) -> BuiltEngine:
    """Load the model and put an engine together; it has passed its self-test on return.

    Raises ConfigError for a bad checkpoint or setting. `transport` is given in tests that join engines. `media`: where
    image embeddings come from; without it requests with images are refused.
    """
    engine = resolve_engine(config.engine)
    config = config.model_copy(update={"engine": engine})
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    device = _device(engine)
    spec = ModelSpec.from_folder(engine.model, weights=engine.load_format != "dummy")
    sizing = size_engine(engine, spec, role)
    spec, max_model_len = sizing.spec, sizing.max_model_len
    dtype = sizing.dtype
    backend = choose(engine.attention_backend, _needs(sizing, engine.block_size, device)).backend
    model = load_model(
        spec,
        dtype=dtype,
        device=device,
        max_positions=max_model_len,
        load_format=engine.load_format,
        progress=lambda name, done, total: progress("loading weights", done, total),
    )
    sampler = Sampler(spec.vocab_size, device)
    if device.type == "cuda":
        progress("measuring memory", 0, 1)
        sizing = _size_for_gpu(engine, spec, role, sizing, model, backend, sampler)
    layout = sizing.layout
    blocks = {g.name: g.num_blocks for g in layout.groups}
    log.info("kv cache sized", budget_bytes=sizing.budget_nbytes, blocks=blocks, dtype=sizing.kv_dtype)
    transport = transport or make_transport(config, clock)
    if device.type == "cpu":
        bases = {g.name: transport.allocate(g.name, layout.block_nbytes(g.name) * g.num_blocks) for g in layout.groups}
        pool = KVPool(layout, bases, device, sizing.scales)
    else:
        pool = KVPool(layout, None, device, sizing.scales)
        bases = pool.bases()
    runner = ModelRunner(model, pool, backend, sampler, device, engine.max_num_seqs)
    if device.type == "cuda" and not engine.enforce_eager:
        runner.graphs = _record(runner, model, engine, layout, pool, backend, max_model_len, progress)
    draft_runner = None
    if spec.has_drafts:
        groups = {FULL_GROUP: (layout.group(FULL_GROUP).block_size, 0)}
        draft_runner = DraftRunner(
            model, pool, backend, sampler, runner.inputs, spec.hidden_size, groups, lambda: runner.on_progress()
        )
    limits = ModelLimits(
        model_hash=spec.model_hash,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_ids=frozenset(spec.eos_token_ids),
        max_waiting_seqs=engine.max_waiting_seqs,
        max_num_seqs=engine.max_num_seqs,
    )
    images = Media(spec.media, spec.hidden_size, media, clock)
    drafter = Drafter(_speculator(config, sizing, role), draft_runner)
    parts = assemble(config, layout, bases, limits, runner, transport, images, clock, drafter)
    progress("self-test", 0, 1)
    built = Engine(parts)
    self_test(built, parts, transport if device.type == "cpu" else None, bases, max_model_len)
    ready = EngineReady(
        layout=layout,
        endpoints=(transport.endpoint(),),
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        architecture=spec.model_type,
        dtype=dtype,
        device=str(device),
        lease_ttl_s=engine.lease_ttl_s,
        pid=os.getpid(),
    )
    return BuiltEngine(built, ready, parts, transport, clock)


def assemble(
    config: WorkerConfig,
    layout: KVLayout,
    bases: dict[str, int],
    limits: ModelLimits,
    runner: ModelRunner,
    transport: Transport,
    media: Media,
    clock: Clock,
    drafter: Drafter,
) -> EngineParts:
    """Join the parts around a runner and a transport."""
    engine = config.engine
    outbox = Outbox()
    cache = KVCacheManager(layout, clock, enable_prefix_caching=engine.enable_prefix_caching)
    scheduler_limits = SchedulerLimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.state_snapshot_interval, limits.max_model_len
    )
    scheduler = Scheduler(cache, scheduler_limits, clock)
    requests = Requests(limits, scheduler, media, outbox, clock)
    reader = HandoffReader(layout, bases, cache, transport, clock, config.handoff, outbox.send)
    demand = Demand(reader, cache, config.handoff, clock)
    leases = Leases(cache, clock, engine.lease_ttl_s)
    publisher = Publisher(layout, bases, cache, digest)
    supply = Supply(SupplyParts(limits, scheduler, media, leases, publisher, outbox, clock), requests.next_id)
    speculator = drafter.speculator

    counted = EngineCounters(requests, cache, reader, demand, leases, supply, speculator)
    main_group = layout.groups[0].name
    meter = LoadMeter(scheduler, cache, main_group, outbox, clock, counted.values, counted.traffic, counted.labelled)

    def started(seq: Sequence, hit: PrefixHit) -> None:
        (requests if seq.order is None else supply).started(seq, hit)

    scheduler.connect(demand.try_remote, demand.cancel, started, speculator.propose if speculator else None)
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
        speculator=speculator,
        drafting=drafter.drafting(cache, layout),
        check_ledger=engine.check_ledger,
        overlap=engine.async_scheduling == "on",
    )


def _device(engine: EngineConfig) -> torch.device:
    """Where a config with its device filled in computes. ConfigError where torch cannot."""
    if engine.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is cuda; torch {torch.__version__} finds no GPU here: install a torch for CUDA, or say cpu",
            param="device",
        )
    device = torch.device("cuda", engine.devices[0] if engine.devices else 0)
    torch.cuda.set_device(device)
    return device


def _size_for_gpu(
    engine: EngineConfig,
    spec: ModelSpec,
    role: Role,
    sizing: EngineSizing,
    model: DecoderModel,
    backend: AttentionBackend,
    sampler: Sampler,
) -> EngineSizing:
    """The sizing with a pool that fits beside weights and steps on the current GPU."""
    weights, tokens = weights_nbytes(), engine.max_num_batched_tokens
    small = _smallest_sizing(engine, spec, role, min(sizing.max_model_len, tokens))
    device = torch.device("cuda", torch.cuda.current_device())
    pool = KVPool(small.layout, None, device, small.scales)
    beside = weights_nbytes() - weights
    runner = ModelRunner(model, pool, backend, sampler, device, engine.max_num_seqs)
    run_largest_step(
        runner, small.layout, max_tokens=tokens, max_seqs=engine.max_num_seqs, max_model_len=small.max_model_len
    )
    del pool, runner
    memory = measure(weights, graphs=not engine.enforce_eager, beside=beside)
    budget = memory.pool_nbytes(engine.gpu_memory_utilization)
    log.info("gpu memory", total_mib=memory.total >> 20, pool_mib=budget >> 20, taken=memory.describe())
    return size_engine(engine, spec, role, budget)


def _smallest_sizing(engine: EngineConfig, spec: ModelSpec, role: Role, max_model_len: int) -> EngineSizing:
    """A pool for one sequence of this length, and little more."""
    small = engine.model_copy(update={"max_model_len": max_model_len, "kv_cache_memory_bytes": 0})
    budget = 1 << 28
    while True:
        try:
            return size_engine(small, spec, role, budget)
        except ConfigError as error:
            if error.param != "kv_cache_memory_bytes":
                raise
            budget *= 2


def _record(
    runner: ModelRunner,
    model: DecoderModel,
    engine: EngineConfig,
    layout: KVLayout,
    pool: KVPool,
    backend: AttentionBackend,
    max_model_len: int,
    progress: Progress,
) -> DecodeGraphs:
    """Decode steps of all sizes, and those that verify drafts."""
    shape = GraphShape(
        groups={g.name: (g.block_size, g.window) for g in layout.groups if g.retention is not Retention.SNAPSHOT},
        states=[g.name for g in layout.groups if g.retention is Retention.SNAPSHOT and g.name != TAIL_GROUP],
        max_seq_len=max_model_len,
    )
    speculative = engine.speculative_config
    most = 1 + (speculative.num_speculative_tokens if speculative.method != "none" else 0)
    sizes = engine.cuda_graph_sizes or graph_sizes(engine.max_num_seqs)
    graphs = DecodeGraphs(model.forward, pool, backend, runner.inputs, runner.drawn_R, shape, sizes, range(1, most + 1))
    graphs.record(lambda done, total: progress("recording decode steps", done, total))
    return graphs


def _needs(sizing: EngineSizing, block_size: int, device: torch.device) -> Needs:
    """What attention has to be able to do."""
    spec = sizing.spec
    return Needs(
        device=device.type,
        dtype=sizing.dtype,
        kv_dtype=sizing.kv_dtype,
        head_dim=spec.head_dim if spec.mla is None else spec.mla.row_dim,
        group_size=spec.num_heads // spec.num_kv_heads if spec.mla is None and spec.compress is None else 1,
        block_size=block_size,
        has_windows=spec.cache.has_windows,
        latent=spec.mla is not None or spec.compress is not None,
    )


def _speculator(config: WorkerConfig, sizing: EngineSizing, role: Role) -> Speculator | None:
    if role is not Role.DECODE:
        return None
    return make_speculator(
        config.engine.speculative_config,
        num_layers=sizing.spec.num_layers,
        vocab_size=sizing.spec.vocab_size,
        max_model_len=sizing.max_model_len,
    )
