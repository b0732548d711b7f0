"""What a config and a checkpoint's shape alone decide about an engine: refused settings, lengths, the KV pool.

No torch and no weights: `nanodeploy up` asks here before it starts anything, the engine when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from common.config import EngineConfig
from common.engine.gpus import has_driver
from common.errors import ConfigError
from common.kvcache.layout import KVLayout
from common.kvcache.scales import KVScales
from common.models.kv import kv_layout, region_scales, size_num_blocks
from common.models.kv_scales import FLOAT8, find_scales
from common.models.pooling import find_pooling
from common.models.spec import ModelSpec
from common.types import Role

# CPU memory is shared with everything else, so `gpu_memory_utilization` of what is available is an upper bound.
CPU_KV_BYTES = 2 << 30
ANY_GPU_NBYTES = 1 << 40


@dataclass(frozen=True)
class DeviceDefaults:
    """What a config that leaves it open gets."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_tokens: int  # of a prefill worker's step


# Latent kernels want blocks of 64.
DEFAULTS = {
    "cpu": DeviceDefaults(block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, prefill_tokens=2048),
    "cuda": DeviceDefaults(block_size=64, max_num_seqs=512, max_num_batched_tokens=8192, prefill_tokens=4096),
}
BUSY_TOKENS = 1024  # of a dense model: H100s read its weights in the time of a quarter; CPUs are no faster with more
LEASED_TAILS = 8  # tail rows of published prompts outlive their sequences on a prefill worker
MIN_MODEL_LEN = 3  # a prompt token and two of output, which the self-test takes


@dataclass(frozen=True)
class EngineSizing:
    spec: ModelSpec  # as the engine computes it
    dtype: str
    kv_dtype: str
    max_model_len: int
    layout: KVLayout
    budget_nbytes: int  # what the layout was cut from
    scales: Mapping[str, tuple[KVScales, ...]]  # by region, of an 8-bit cache


def resolve_engine(config: EngineConfig, role: Role = Role.DECODE) -> EngineConfig:
    """The config with its device, and what follows from that and the role, filled in; without torch, so an engine may
    still find that its torch has no CUDA. Raises `ConfigError` for what is not possible on this machine.
    """
    has_gpu = has_driver()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device is cuda; this machine has no NVIDIA driver: say cpu or auto", param="device")
    device: Literal["cpu", "cuda"] = "cuda" if has_gpu and config.device != "cpu" else "cpu"
    if config.devices and len(config.devices) != config.tensor_parallel_size:
        raise ConfigError(
            f"devices names {len(config.devices)} GPUs; tensor_parallel_size is {config.tensor_parallel_size}",
            param="devices",
        )
    default = DEFAULTS[device]
    max_tokens = default.prefill_tokens if role is Role.PREFILL else default.max_num_batched_tokens
    overlap = "on" if device == "cuda" else "off"
    return config.model_copy(
        update={
            "device": device,
            "block_size": config.block_size or default.block_size,
            "max_num_seqs": config.max_num_seqs or default.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens or max_tokens,
            "async_scheduling": {"auto": overlap}.get(config.async_scheduling, config.async_scheduling),
        }
    )


def busy_tokens(spec: ModelSpec) -> int:
    """Tokens with which a step keeps the device busy: an expert of a mixture gets its share of them only."""
    return BUSY_TOKENS if spec.moe is None else BUSY_TOKENS * spec.moe.num_experts // spec.moe.top_k


def size_engine(
    config: EngineConfig, spec: ModelSpec, role: Role, budget_nbytes: int = 0, tp_rank: int = 0
) -> EngineSizing:
    """Rank `tp_rank` of the engine of a worker of `role`. `ConfigError` if settings and checkpoint do not fit.

    `budget_nbytes`: of the KV pool, where the config leaves it open; 0: what the CPU's memory allows, and on a GPU, of
    which nothing is known here, no limit.
    """
    config = resolve_engine(config, role)
    if not config.sparse_attention:
        spec = spec.with_dense_attention()
    spec = _with_drafts(config, _with_pooling(config, spec))
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    kv_dtype = {"auto": dtype, "fp8_e4m3": FLOAT8}.get(config.kv_dtype, config.kv_dtype)
    scales = _scales(config, spec) if kv_dtype == FLOAT8 else {}
    max_model_len = _max_model_len(config, spec)
    budget = config.kv_cache_memory_bytes or budget_nbytes
    if not budget and config.device == "cuda":
        budget = ANY_GPU_NBYTES
    elif not budget:
        available = psutil.virtual_memory().available
        budget = int(min(CPU_KV_BYTES, config.gpu_memory_utilization * available / 2))
    num_blocks = size_num_blocks(
        spec,
        budget,
        kv_dtype=kv_dtype,
        dtype=dtype,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_tails=config.max_num_seqs * (LEASED_TAILS if role is Role.PREFILL else 2),
        # Orders reserve their whole prompt, in window groups too.
        max_num_batched_tokens=max_model_len if role is Role.PREFILL else config.max_num_batched_tokens,
        tp_size=config.tensor_parallel_size,
        scales=scales,
    )
    layout = kv_layout(
        spec,
        kv_dtype=kv_dtype,
        dtype=dtype,
        block_size=config.block_size,
        num_blocks=num_blocks,
        tp_size=config.tensor_parallel_size,
        tp_rank=tp_rank,
        scales=scales,
    )
    return EngineSizing(spec, dtype, kv_dtype, max_model_len, layout, budget, region_scales(spec, layout, scales))


def _scales(config: EngineConfig, spec: ModelSpec) -> dict[int, KVScales]:
    """By layer; all 1 for dummy weights, none where rows carry their own."""
    if not any(r.holds_kv for r in spec.cache.regions):
        return {}
    if config.load_format == "dummy" and not config.kv_scales:
        return {layer: KVScales(k=1.0, v=1.0) for r in spec.cache.regions if r.holds_kv for layer in r.layers}
    return find_scales(spec, config.kv_scales)


def _with_pooling(config: EngineConfig, spec: ModelSpec) -> ModelSpec:
    pooling = find_pooling(spec.folder, config.runner, spec.hidden_size)
    if pooling is not None and config.speculative_config.method != "none":
        raise ConfigError(
            f"speculative_config: {spec.folder} is served for embeddings, which have no drafts",
            param="speculative_config",
        )
    return replace(spec, pooling=pooling)


def _with_drafts(config: EngineConfig, spec: ModelSpec) -> ModelSpec:
    if config.speculative_config.method != "mtp" or spec.has_drafts:
        return spec
    if not spec.mtp_layers:
        raise ConfigError(
            f"speculative_config.method is mtp; {spec.folder} ({spec.model_type}) has no multi-token-prediction layer "
            "that this version reads: say ngram",
            param="speculative_config",
        )
    return spec.with_drafts()


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    longest = spec.max_position_embeddings
    if config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the checkpoint allows {longest}", param="max_model_len"
        )
    if 0 < config.max_model_len < MIN_MODEL_LEN:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the least is {MIN_MODEL_LEN}, a prompt token and two of output",
            param="max_model_len",
        )
    return config.max_model_len or longest
