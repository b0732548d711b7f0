"""Where an engine computes: on the CPU, whatever else the machine has, and never on a device it cannot use."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine_support import Solo, greedy, llama, make_engine, prompts, reference_tokens
from worker_support import ManualClock

from common.engine import compute
from common.engine.gpu_memory import GpuMemory
from common.errors import ConfigError
from common.kvtransfer.memory import MemoryNetwork
from common.models import weights
from common.types import Role

__all__ = ["llama"]


def test_a_gpu_beside_it_does_not_change_where_an_engine_computes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prompt = prompts(7, [20])[0]
    expected = reference_tokens(llama, prompt, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    solo = Solo(llama)
    answer = solo.submit(prompt, greedy(4))
    solo.run()
    assert answer.tokens[0] == expected


@pytest.mark.parametrize("setting", [{"device": "cuda"}, {"devices": (0, 1)}])
def test_what_the_cpu_cannot_do_is_refused_by_name(llama: Path, setting: dict[str, object]) -> None:
    clock = ManualClock()
    with pytest.raises(ConfigError, match=next(iter(setting))):
        make_engine(llama, Role.DECODE, MemoryNetwork(clock), clock, **setting)


TORCHS_WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.20 GiB of which 1.10 GiB is free."
    " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
)


@pytest.mark.parametrize(
    ("module", "place", "what"),
    [
        (weights, "model_class", "the weights"),
        (compute, "load_model", "the weights"),
        (compute, "KVPool", "the KV cache"),
    ],
)
def test_what_has_no_room_at_the_start_is_a_refused_start(
    module: ModuleType, place: str, what: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's allocator says it wherever it finds no room; here there is no GPU to be filled."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(TORCHS_WORDS)

    monkeypatch.setattr(module, place, full)
    clock = ManualClock()
    with pytest.raises(ConfigError, match=f"no room for {what}: CUDA out of memory.*1.10 GiB is free.$"):
        make_engine(llama, Role.DECODE, MemoryNetwork(clock), clock)


def test_the_pool_is_what_is_left_and_none_left_says_where_memory_went() -> None:
    mib = 1 << 20
    memory = GpuMemory(total=1000 * mib, others=50 * mib, weights=600 * mib, step_peak=100 * mib, graphs=30 * mib)
    assert memory.pool_nbytes(0.9) == 120 * mib
    with pytest.raises(ConfigError, match="weights 600 MiB, a step 100 MiB, graphs 30 MiB, others 50 MiB") as raised:
        memory.pool_nbytes(0.78)
    assert raised.value.param == "gpu_memory_utilization"
