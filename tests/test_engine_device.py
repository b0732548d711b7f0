"""Where an engine computes: on the CPU, whatever else the machine has, and never on a device it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_support import Solo, greedy, llama, make_engine, prompts, reference_tokens
from worker_support import ManualClock

from common.errors import ConfigError
from common.kvtransfer.memory import MemoryNetwork
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
