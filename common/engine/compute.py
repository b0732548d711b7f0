"""One rank's part of an engine: its share of the weights and of the cache, its transport, and what runs steps on them.

Every rank makes it the same way, from the same config; the ranks of one engine agree on the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.attention.capability import Needs
from common.attention.context import DTYPES, AttentionBackend
from common.attention.select import choose
from common.config import EngineConfig, WorkerConfig
from common.engine.draft_graphs import DraftGraphs, DraftLimits, logits_nbytes
from common.engine.draft_runner import DraftRunner
from common.engine.drafting import FIRST
from common.engine.fp8_kernels import compile_beforehand
from common.engine.gpu_memory import (
    GRAPHS_NBYTES,
    give_memory_back,
    measure,
    room_for,
    run_draft_layer,
    run_steps,
    weights_nbytes,
)
from common.engine.graphs import DecodeGraphs, GraphShape, graph_sizes
from common.engine.runner import ModelRunner
from common.engine.sampler import Sampler
from common.engine.sizing import MIN_MODEL_LEN, EngineSizing, size_engine
from common.errors import ConfigError
from common.kernels import gpu
from common.kvcache.layout import FULL_GROUP, TAIL_GROUP, KVLayout, Retention
from common.kvcache.pool import GUARD_NBYTES, KVPool
from common.kvtransfer.device import over_ucx
from common.kvtransfer.device_digests import DeviceDigests
from common.kvtransfer.digester import digest
from common.kvtransfer.memory import MemoryNetwork, MemoryTransport
from common.kvtransfer.publish import DigestLauncher, HostDigests
from common.kvtransfer.transport import Transport
from common.kvtransfer.ucx import UcxTransport
from common.layers.base import TensorParallel
from common.models.decoder import DecoderModel
from common.models.spec import ModelSpec
from common.models.weights import load_model
from common.parallel.mesh import Mesh
from common.telemetry import get_logger
from common.types import Clock, Role

log = get_logger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compute:
    """`bases`: group -> address of its block 0. `draft_runner` is None without a multi-token-prediction layer."""

    sizing: EngineSizing
    bases: dict[str, int]
    transport: Transport
    runner: ModelRunner
    draft_runner: DraftRunner | None

    @property
    def layout(self) -> KVLayout:
        return self.sizing.layout

    @room_for("a recorded head", "cuda_graph_sizes")
    def record_head(self) -> None:
        """Make first tokens of hand-offs quicker to draw, where steps are recorded and draws are Triton's."""
        if self.runner.graphs is not None and not gpu.unavailable():
            self.runner.record_head()

    def forget_steps(self) -> None:
        """Before collectives are closed: NCCL waits for recorded steps that refer to it."""
        self.runner.forget_steps()
        if self.draft_runner is not None:
            self.draft_runner.graphs = None


def make_transport(config: WorkerConfig, clock: Clock, device: torch.device) -> Transport:
    """The first configured transport, of memory of `device`. ConfigError names one that does not exist."""
    name = config.handoff.transports[0] if config.handoff.transports else "memory"
    if name == "ucx" and device.type == "cuda":
        return over_ucx(UcxTransport(config.ucx, device.index or 0), device)
    if name == "ucx":
        return UcxTransport(config.ucx)
    if name == "memory":
        return MemoryTransport(MemoryNetwork(clock), digest)
    raise ConfigError(f"handoff.transports: unknown transport {name!r}; there are ucx and memory")


def digest_launcher(device: torch.device) -> DigestLauncher:
    """What digests published memory of `device`: on a GPU ahead of the next step, and beside it."""
    if device.type != "cuda":
        return HostDigests(digest)
    return DeviceDigests(device, torch.cuda.Stream(device, priority=-1))  # type: ignore[no-untyped-call]


def make_compute(
    config: WorkerConfig,
    role: Role,
    mesh: Mesh,
    clock: Clock,
    progress: Progress = lambda *_: None,
    transport: Transport | None = None,
) -> Compute:
    """Load the model and lay out the cache of one rank. The engine's config is resolved.

    ConfigError for a bad checkpoint or setting.
    """
    engine, device = config.engine, mesh.device
    spec = ModelSpec.from_folder(engine.model, weights=engine.load_format != "dummy")
    sizing = _size(engine, spec, role, mesh)
    spec = sizing.spec
    backend = _attention(engine, sizing, device)
    if device.type == "cuda" and (why := gpu.unavailable()):
        log.warning("layers, experts and draws without Triton", reason=why, instead="plain torch")
    if device.type == "cuda" and not engine.deterministic:  # whose kernels are others
        compile_beforehand(
            spec,
            sizing.dtype,
            engine.quantization,
            ranks=mesh.size,
            tokens=engine.max_num_batched_tokens,
            device=device,
            progress=lambda done, total: progress("compiling FP8 kernels", done, total),
        )
    if device.type == "cuda":  # an engine that failed in this process may hold memory in cycles
        give_memory_back()
    with room_for("the weights", "tensor_parallel_size"):
        model = load_model(
            spec,
            dtype=sizing.dtype,
            device=device,
            max_positions=sizing.max_model_len,
            tp=_tensor_parallel(mesh),
            load_format=engine.load_format,
            quantization=engine.quantization,
            fixed=engine.deterministic,
            progress=lambda name, done, total: progress("loading weights", done, total),
        )
    sampler = Sampler(spec.vocab_size, device)
    records = device.type == "cuda" and _may_record(engine, model, backend)
    records_drafts = records and spec.has_drafts and role is Role.DECODE and not gpu.unavailable()
    if device.type == "cuda":
        progress("measuring memory", 0, 1)
        draft_nbytes = logits_nbytes(engine.max_num_seqs, spec.vocab_size) if records_drafts else 0
        graphs_nbytes = GRAPHS_NBYTES + draft_nbytes if records else 0
        sizing = _size_for_gpu(engine, spec, role, mesh, sizing, model, backend, sampler, graphs_nbytes)
    layout = sizing.layout
    blocks = {g.name: g.num_blocks for g in layout.groups}
    log.info("kv cache sized", budget_bytes=sizing.budget_nbytes, blocks=blocks, dtype=sizing.kv_dtype)
    transport = transport or make_transport(config, clock, device)
    pool, bases = _pool(sizing, transport, device)
    runner = ModelRunner(model, pool, backend, sampler, device, engine.max_num_seqs)
    if records:
        runner.graphs = _record(runner, model, engine, layout, pool, backend, sizing.max_model_len, progress)
    draft_runner = None
    if spec.has_drafts:
        runner.rows_outlive = True
        draft_runner = _draft_runner(runner, model, sizing, pool, backend, sampler)
        if runner.graphs is not None and records_drafts:
            draft_runner.graphs = _record_drafts(runner.graphs, runner, model, engine, sizing, pool, backend, progress)
    return Compute(sizing, bases, transport, runner, draft_runner)


def _draft_runner(
    runner: ModelRunner,
    model: DecoderModel,
    sizing: EngineSizing,
    pool: KVPool,
    backend: AttentionBackend,
    sampler: Sampler,
) -> DraftRunner:
    """Of the model's multi-token-prediction layer, beside `runner`."""
    groups = {FULL_GROUP: (sizing.layout.group(FULL_GROUP).block_size, 0)}
    hidden_size = sizing.spec.hidden_size
    return DraftRunner(model, pool, backend, sampler, runner.inputs, hidden_size, groups, lambda: runner.on_progress())


@room_for("the KV cache", "gpu_memory_utilization")
def _pool(sizing: EngineSizing, transport: Transport, device: torch.device) -> tuple[KVPool, dict[str, int]]:
    """The memory of the cache, which the transport knows, and its `bases`."""
    layout = sizing.layout
    if device.type == "cpu":
        bases = {g.name: transport.allocate(g.name, layout.block_nbytes(g.name) * g.num_blocks) for g in layout.groups}
        return KVPool(layout, bases, device, sizing.scales), bases
    pool = KVPool(layout, None, device, sizing.scales)
    bases = pool.bases()
    for name, guard in pool.guards().items():
        transport.register(name, bases[name], pool.nbytes(name), guard, GUARD_NBYTES)
    return pool, bases


def _attention(engine: EngineConfig, sizing: EngineSizing, device: torch.device) -> AttentionBackend:
    """The backend that can serve and, on a GPU too, adds in a fixed order where that is asked for; else ConfigError."""
    requested: str = engine.attention_backend
    if engine.deterministic and device.type == "cuda":
        if sizing.spec.compress is not None:
            raise ConfigError("compressed entries have no kernels of a fixed order on a GPU", param="deterministic")
        if requested not in ("auto", "fixed"):
            raise ConfigError(f"deterministic: {requested} adds in an order of its own", param="attention_backend")
        requested = "fixed"
    return choose(requested, _needs(sizing, engine.block_size, device)).backend


def _size(engine: EngineConfig, spec: ModelSpec, role: Role, mesh: Mesh) -> EngineSizing:
    """Before anything is on the device: the same number of blocks on all ranks."""
    sizing = size_engine(engine, spec, role, tp_rank=mesh.rank)
    (budget,) = mesh.least([sizing.budget_nbytes])
    return sizing if budget == sizing.budget_nbytes else size_engine(engine, spec, role, budget, mesh.rank)


@room_for("the largest step", "max_num_batched_tokens")
def _size_for_gpu(
    engine: EngineConfig,
    spec: ModelSpec,
    role: Role,
    mesh: Mesh,
    sizing: EngineSizing,
    model: DecoderModel,
    backend: AttentionBackend,
    sampler: Sampler,
    graphs_nbytes: int,
) -> EngineSizing:
    """The sizing with a pool that fits beside weights and steps on the GPU of every rank, which measure it together.

    `graphs_nbytes`: left for recorded steps.
    """
    weights, tokens = weights_nbytes(), engine.max_num_batched_tokens
    small = _smallest_sizing(engine, spec, role, mesh.rank, min(sizing.max_model_len, tokens))
    pool = KVPool(small.layout, None, mesh.device, small.scales)
    beside = weights_nbytes() - weights
    runner = ModelRunner(model, pool, backend, sampler, mesh.device, engine.max_num_seqs)
    run_steps(
        runner,
        small.layout,
        max_tokens=tokens,
        max_seqs=engine.max_num_seqs,
        longest=small.max_model_len,
        max_model_len=sizing.max_model_len,
        max_draws=_max_draws(engine) if role is Role.DECODE else 1,
    )
    if spec.has_drafts:
        drafts = _draft_runner(runner, model, small, pool, backend, sampler)
        group = small.layout.group(FULL_GROUP)
        run_draft_layer(drafts, group, longest=min(tokens, small.max_model_len), max_model_len=sizing.max_model_len)
        del drafts
    del pool, runner
    memory = measure(weights, graphs=graphs_nbytes, beside=beside)
    (budget,) = mesh.least([memory.pool_nbytes(engine.gpu_memory_utilization)])
    log.info("gpu memory", total_mib=memory.total >> 20, pool_mib=budget >> 20, taken=memory.describe())
    return size_engine(engine, spec, role, budget, mesh.rank)


def _smallest_sizing(engine: EngineConfig, spec: ModelSpec, role: Role, rank: int, max_model_len: int) -> EngineSizing:
    """A pool for one sequence of this length, or of the least that an engine can have, and little more."""
    length = max(max_model_len, MIN_MODEL_LEN)
    small = engine.model_copy(update={"max_model_len": length, "kv_cache_memory_bytes": 0})
    budget = 1 << 28
    while True:
        try:
            return size_engine(small, spec, role, budget, rank)
        except ConfigError as error:
            if error.param != "kv_cache_memory_bytes":
                raise
            budget *= 2


@room_for("recorded steps", "cuda_graph_sizes")
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
    sizes, query_lens = engine.cuda_graph_sizes or graph_sizes(engine.max_num_seqs), range(1, _max_draws(engine) + 1)
    graphs = DecodeGraphs(model.forward, pool, backend, runner.inputs, runner.drawn_R, shape, sizes, query_lens)
    graphs.record(lambda done, total: progress("recording decode steps", done, total))
    return graphs


@room_for("recorded drafts", "cuda_graph_sizes")
def _record_drafts(
    decode: DecodeGraphs,
    runner: ModelRunner,
    model: DecoderModel,
    engine: EngineConfig,
    sizing: EngineSizing,
    pool: KVPool,
    backend: AttentionBackend,
    progress: Progress,
) -> DraftGraphs:
    """Passes of the draft layer over the tokens that a step with drafts may bring, and over each draft."""
    spec = sizing.spec
    shape = GraphShape({FULL_GROUP: (engine.block_size, 0)}, (), sizing.max_model_len, FIRST)
    max_new = 1 + engine.speculative_config.num_speculative_tokens
    limits = DraftLimits(max_new, spec.hidden_size, DTYPES[sizing.dtype], spec.vocab_size)
    sizes = engine.cuda_graph_sizes or graph_sizes(engine.max_num_seqs)
    graphs = DraftGraphs(model, pool, backend, runner.inputs, shape, sizes, limits, decode.memory_pool)
    graphs.record(lambda done, total: progress("recording drafts", done, total))
    return graphs


def _max_draws(engine: EngineConfig) -> int:
    """Of a sequence in a step: behind its last token, and behind each draft."""
    speculative = engine.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative.method != "none" else 0)


def _may_record(engine: EngineConfig, model: DecoderModel, backend: AttentionBackend) -> bool:
    """Says why not."""
    reasons = {
        "enforce_eager": engine.enforce_eager,
        f"attention backend {backend.name}": not backend.can_record,
        type(model).__name__: not model.can_record,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        log.info("decode steps are not recorded", because=found)
    return not found


def _tensor_parallel(mesh: Mesh) -> TensorParallel:
    if mesh.collectives is None:
        return TensorParallel()
    return TensorParallel(mesh.rank, mesh.size, mesh.collectives.all_reduce, mesh.collectives.all_gather)


def _needs(sizing: EngineSizing, block_size: int, device: torch.device) -> Needs:
    """What attention has to be able to do on one rank."""
    spec, ranks = sizing.spec, sizing.layout.tp_size
    group_size = spec.num_heads // ranks // max(1, spec.num_kv_heads // ranks)
    return Needs(
        device=device.type,
        dtype=sizing.dtype,
        kv_dtype=sizing.kv_dtype,
        head_dim=spec.head_dim if spec.mla is None else spec.mla.row_dim,
        group_size=group_size if spec.mla is None and spec.compress is None else 1,
        block_size=block_size,
        has_windows=spec.cache.has_windows,
        latent=spec.mla is not None or spec.compress is not None,
        expanded=(0, 0) if spec.mla is None else (spec.mla.qk_dim, spec.mla.v_dim),
    )
