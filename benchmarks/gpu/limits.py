"""What the machine itself can do, measured beside the figures that are judged by it.

Copies count bytes read and written. Matrices are drawn at random: on zeros a card runs faster than on any model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 10


def measure(*, dry_run: bool) -> dict[str, Any]:
    """GB/s and TFLOP/s of the first device, and between the first two where there are two."""
    device = torch.device("cpu" if dry_run else "cuda")
    size, nbytes = (256, 1 << 22) if dry_run else (8192, 1 << 32)
    found: dict[str, Any] = {"device": device_name(), "torch": torch.__version__}
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    found["copy_gbps"] = 2 * nbytes / timed(lambda: target.copy_(source)) / 1e9
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    found["bf16_tflops"] = 2 * size**3 / timed(lambda: a @ b) / 1e12
    if dry_run:
        return found
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    found["host_to_device_gbps"] = len(host) / timed(lambda: target[: len(host)].copy_(host, non_blocking=True)) / 1e9
    found["fp8_tflops"] = 2 * size**3 / timed(_fp8_product(size)) / 1e12
    if torch.cuda.device_count() > 1:
        other = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
        here = source[: len(other)]
        found["peer_copy_gbps"] = len(other) / timed(lambda: other.copy_(here, non_blocking=True)) / 1e9
    return found


def device_name() -> str:
    """Of the first GPU, with how many there are; `cpu` without one."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def timed(call: Callable[[], object]) -> float:
    """Median seconds of one call, device work included."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(REPEATS):
        synchronise()
        began = time.perf_counter()
        call()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def synchronise() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def _fp8_product(size: int) -> Callable[[], object]:
    one = torch.ones((), device="cuda")
    a = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn).T
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
