"""Which engine of a cluster gets which of this machine's GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.config import EngineConfig
from common.engine.gpus import num_gpus
from common.errors import ConfigError


def default_num_prefill(device: str | None, environ: Mapping[str, str]) -> int:
    """Prefill workers of a cluster whose user names no number: none where one GPU would hold the weights twice."""
    return 0 if device != "cpu" and num_gpus(environ) == 1 else 1


def deal(engines: Sequence[EngineConfig], count: int) -> tuple[list[EngineConfig], tuple[str, ...]]:
    """Each engine with its GPUs, in turn; and what to say about it.

    Where there are fewer GPUs than engines want, engines share them, and each takes its part of
    `gpu_memory_utilization`. ConfigError if one engine alone wants more than there are.
    """
    dealt: list[tuple[int, ...]] = []
    following = 0
    for engine in engines:
        if engine.devices:
            dealt.append(engine.devices)
            continue
        size = engine.tensor_parallel_size
        if size > count:
            raise ConfigError(
                f"tensor_parallel_size is {size}; this machine has {count} GPUs", param="tensor_parallel_size"
            )
        if following + size > count:
            following = 0
        dealt.append(tuple(range(following, following + size)))
        following = (following + size) % count
    users = {gpu: sum(gpu in devices for devices in dealt) for devices in dealt for gpu in devices}
    out = []
    for engine, devices in zip(engines, dealt, strict=True):
        most = max(users[gpu] for gpu in devices)
        share = {"gpu_memory_utilization": engine.gpu_memory_utilization / most} if most > 1 else {}
        out.append(engine.model_copy(update={"devices": devices, **share}))
    shared = sorted(gpu for gpu, number in users.items() if number > 1)
    if not shared:
        return out, ()
    names = ", ".join(map(str, shared))
    return out, (f"{max(users.values())} engines share GPU {names}, and its memory",)
