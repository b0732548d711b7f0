"""DeepGEMM's kernels compiled beforehand: they are all there, and they are those that it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.engine.deepgemm_build import Product, Request
from common.engine.fp8_kernels import run
from common.kernels.gpu import deepgemm

pytestmark = pytest.mark.gpu

PRODUCTS = [Product(512, 1024), Product(256, 512, experts=8, top_k=2)]
TOKENS = 1000
MULTIPLY = f"""
import torch
from common.engine.deepgemm_build import Product
from common.kernels.gpu import deepgemm
for product in [{", ".join(map(repr, PRODUCTS))}]:
    multiply = deepgemm.idle_product(product.n, product.k, product.experts, max(product.rows({TOKENS})))
    for rows in product.rows({TOKENS}) if product.experts else range(1, {TOKENS} + 1):
        multiply(rows)
torch.cuda.synchronize()
"""


def kernels(folder: Path) -> set[str]:
    return {place.name for place in (folder / "cache").iterdir()}


def test_nothing_is_compiled_afterwards(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if reason := deepgemm.unavailable():
        pytest.skip(reason)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    request = Request(PRODUCTS, TOKENS, cuda.index or 0, os.getpid())
    seen: list[tuple[int, int]] = []
    started = time.monotonic()
    assert run(request, lambda done, total: seen.append((done, total))) == ""
    took = time.monotonic() - started
    made = kernels(tmp_path)
    with capfd.disabled():
        print(f"\n{len(made)} kernels compiled in {took:.0f} s")
    assert seen[-1] == (len(made), len(made))
    assert request.is_done(torch.cuda.get_device_name())
    (tmp_path / "tmp").rename(tmp_path / "tmp.before")
    subprocess.run([sys.executable, "-c", MULTIPLY], check=True, timeout=300)
    assert kernels(tmp_path) == made
    assert not (tmp_path / "tmp").exists(), "DeepGEMM has compiled something itself"
