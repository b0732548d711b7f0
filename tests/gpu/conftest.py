"""Where GPU tests run: on a GPU, and kernels written in Triton on the CPU too if TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def gpu_for_engines() -> Iterator[None]:
    """Skips a module of whole engines without a GPU; their memory is given back behind it."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    yield
    torch.cuda.empty_cache()


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
        _let_numbers_be_bounds()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    return torch.device("cuda")


def _let_numbers_be_bounds() -> None:
    """The interpreter keeps a number as an array of one element, which newer numpy does not take for an index."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if patch.__module__ == interpreter.__name__:

        def patched(tensor: type, scope: interpreter._LangPatchScope) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patched
