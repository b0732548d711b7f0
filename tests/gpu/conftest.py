"""Where GPU tests run: on a GPU, and kernels written in Triton on the CPU too if TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """A GPU; skips without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda")


@pytest.fixture
def kernel_device() -> torch.device:
    """Where a Triton kernel runs: the CPU under Triton's interpreter, else a GPU; skips without either."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    return torch.device("cuda")
