"""DeepGEMM's kernels compiled beforehand: which products a model makes, and how its compiler is stood in for.

The library itself needs a GPU (tests/gpu/test_deepgemm_build.py); here a program that calls its compiler as it does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from models_support import CPU
from mtp_support import make_mtp, make_qwen_mtp
from quant_support import fp8_block, fp8_config, quantise
from test_models_fp8 import LLAMA, MOE, NAMES
from tiny_models import (
    make_deepseek_v3,
    make_deepseek_v4,
    make_deepseek_v32,
    make_glm_moe_dsa,
    make_kimi_k25,
    make_llama,
    make_qwen3,
    make_qwen3_5,
    make_qwen3_moe,
    make_qwen3_next,
    make_qwen3_vl,
    make_qwen3_vl_moe,
)

from common.attention.flashinfer_modules import alone
from common.engine import kernels
from common.engine.deepgemm_build import Product, Request, Shelf, compile_all
from common.engine.fp8_kernels import products_of, run
from common.kernels.gpu import deepgemm
from common.layers.base import TensorParallel
from common.models import weights
from common.models.spec import ModelSpec
from common.models.weights import load_model


def test_rows_of_all_that_is_cut_alike() -> None:
    """DeepGEMM looks at how many tiles of 64, 128 and 256 rows there are, and whether 16 or 32 would do."""

    def cut(rows: int) -> tuple[int, ...]:
        return *(-(-rows // tile) for tile in (64, 128, 256)), rows <= 16, rows <= 32

    for tokens in (1, 16, 17, 33, 64, 65, 1000):
        rows = Product(64, 128).rows(tokens)
        assert {cut(n) for n in range(1, tokens + 1)} <= {cut(n) for n in rows}
        assert len({cut(n) for n in rows}) == len(rows)


def test_rows_of_experts() -> None:
    """As many as `routing.tile_map` makes tiles."""
    rows = Product(128, 128, experts=8, top_k=2).rows(5000)
    for tokens in range(96 * 8 // 2, 5001):
        assert (min(8, 2 * tokens) + 2 * tokens // 128) * 128 in rows
    assert Product(128, 128, experts=64, top_k=2).rows(10) == []


def test_what_deepgemm_multiplies_by() -> None:
    assert Product(64, 128).can
    assert not Product(32, 128).can
    assert not Product(64, 192).can
    assert not Product(192, 128, experts=4).can


def fp8_model(root: Path, make: Any, excluded: list[str], **sizes: Any) -> ModelSpec:
    make(root / "model", **sizes)

    def choose(name: str, w: torch.Tensor) -> Any:
        is_linear = name.endswith(("_proj.weight", "_with_mqa.weight")) and not any(part in name for part in excluded)
        return fp8_block(w, (128, 128), torch.float32, NAMES) if is_linear else None

    quantise(root / "model", root / "plain", fp8_config((128, 128), modules_to_not_convert=excluded), choose)
    return ModelSpec.from_folder(root / "model")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("make", [make_llama, make_qwen3_moe])
@pytest.mark.parametrize("excluded", [[], ["model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.2.mlp"]])
def test_products_are_those_of_the_loaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, make: Any, excluded: list[str]
) -> None:
    spec = fp8_model(tmp_path, make, excluded, **(LLAMA if make is make_llama else MOE))
    found = products_of(spec, "bfloat16", "auto", ranks)
    monkeypatch.setattr(weights, "keeps_fp8", lambda *_: True)
    tp = TensorParallel(1, ranks, lambda partial: partial) if ranks > 1 else None
    model = load_model(spec, dtype="bfloat16", device=CPU, tp=tp)
    shapes: set[tuple[int, ...]] = set()
    for slot in model.slots():
        holder: Any = slot.holder
        if holder is not None and holder.in_fp8:
            shapes |= {tuple(w.shape) for w in (holder.weights[:2] if hasattr(holder, "weights") else [holder.weight])}
    assert {(p.experts, p.n, p.k) if p.experts else (p.n, p.k) for p in found} == shapes
    assert shapes
    assert all(p.top_k == (spec.moe.top_k if spec.moe and p.experts else 0) for p in found)
    assert len(set(found)) == len(found)


FAMILIES = [
    make_qwen3,
    make_qwen3_vl,
    make_qwen3_vl_moe,
    make_kimi_k25,
    make_deepseek_v3,
    make_deepseek_v32,
    make_glm_moe_dsa,
    make_deepseek_v4,
    make_qwen3_next,
    make_qwen3_5,
    make_mtp,
    make_qwen_mtp,
]


@pytest.mark.parametrize("make", FAMILIES)
def test_families_are_looked_at_without_memory(tmp_path: Path, make: Any) -> None:
    spec = ModelSpec.from_folder(make(tmp_path / "model"))
    assert isinstance(products_of(spec, "bfloat16", "fp8", 1), list)
    assert products_of(spec, "bfloat16", "auto", 1) == []
    assert products_of(spec, "bfloat16", "none", 1) == []


NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release 13.0"; exit; fi
echo "$*" >> "$CALLS"
if grep -q broken "$1"; then echo "no such type" >&2; exit 1; fi
touch "$0.$$"
for i in $(seq 100); do  # there are two at once, or it fails
  if [ $(ls "$0".* | wc -l) -ge 2 ]; then cat "$1" > "$4"; exit; fi
  sleep 0.05
done
exit 1
"""


class Library:
    """Compiles as DeepGEMM does: into a folder of its own, by a shell, then into place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked = 0

    def multiply(self, code: str) -> None:
        self.asked += 1
        place = self.root / "cache" / code
        if place.exists():
            return
        folder = self.root / "tmp" / str(self.asked)
        folder.mkdir(parents=True)
        (folder / "kernel.cu").write_text(f"kernel {code}")
        nvcc, flags = os.environ["DG_JIT_NVCC_COMPILER"], "-std=c++20 --options=-fPIC,-O3 -O3"
        command = f"cd {self.root} && {nvcc} {folder}/kernel.cu -cubin -o {folder}/kernel.cubin {flags}"
        if subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.DEVNULL, check=False).returncode:
            raise RuntimeError("NVCC compilation failed")
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)

    def calls(self, codes: str) -> Callable[[], Iterator[Callable[[], None]]]:
        return lambda: (partial(self.multiply, code) for code in codes.split())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o700)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(tmp_path / "nvcc"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return Library(tmp_path / "library")


@pytest.fixture
def shelf(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Its folder has a space in its name."""
    (tmp_path / "a shelf").mkdir()
    shelf = Shelf(tmp_path / "a shelf", deepgemm.compiler())
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", f"'{shelf.open()}'")
    return shelf


def test_kernels_are_compiled_once_each_and_several_at_a_time(library: Library, shelf: Shelf, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    num = compile_all(library.calls("a b a c b d"), shelf, 4, lambda done, total: seen.append((done, total)))
    assert num == 4
    assert compile_all(library.calls("a d"), shelf, 4, lambda *_: None) == 0
    version = subprocess.run([shelf.folder / "nvcc", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == "release 13.0\n"
    assert seen == [(n, 4) for n in range(1, 5)]
    made = {place.name: (place / "kernel.cubin").read_text() for place in (library.root / "cache").iterdir()}
    assert made == {code: f"kernel {code}" for code in "abcd"}
    assert not list((library.root / "tmp").iterdir())
    lines = (tmp_path / "calls").read_text().splitlines()
    assert len(lines) == 4
    assert all(line.endswith("-std=c++20 --options=-fPIC,-O3 -O3") and " -cubin -o " in line for line in lines)


def test_a_kernel_that_does_not_compile(library: Library, shelf: Shelf) -> None:
    with pytest.raises(RuntimeError, match="a kernel does not compile: no such type"):
        compile_all(library.calls("a b broken"), shelf, 4, lambda *_: None)


def test_a_call_that_fails_with_its_kernel_there(library: Library, shelf: Shelf) -> None:
    def wrong() -> None:
        raise RuntimeError("not this shape")

    def calls() -> Iterator[Callable[[], None]]:
        yield from library.calls("a b")()
        yield wrong

    with pytest.raises(RuntimeError, match="not this shape"):
        compile_all(calls, shelf, 4, lambda *_: None)


def test_the_compiler_that_there_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DG_JIT_NVCC_COMPILER", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="need the CUDA toolkit"):
        deepgemm.compiler()
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", shutil.which("true") or "")
    assert deepgemm.compiler() == shutil.which("true")


@pytest.fixture
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", shutil.which("true") or "")
    return tmp_path / "kept"


def test_what_was_done_is_not_done_again(kept_here: Path) -> None:
    def request(tokens: int, *products: Product) -> Request:
        return Request(list(products), tokens, 0, 1)

    one, two = Product(128, 128), Product(256, 128)
    assert not request(100, one, two).is_done("card")
    request(100, one, two).set_done("card")
    assert request(100, two, one).is_done("card")
    assert request(50, one, two).is_done("card")
    assert not request(101, one, two).is_done("card")
    assert not request(100, one).is_done("card")
    assert not request(100, one, two).is_done("another card")
    assert deepgemm.folder() == kept_here
    shutil.rmtree(kept_here)
    assert not request(100, one, two).is_done("card")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("kept_here")
def test_the_process_says_why_it_failed() -> None:
    failed = run(Request([Product(128, 128)], 100, 0, os.getpid()), lambda *_: None)
    assert failed == "deep_gemm is not installed" or "CUDA" in failed or "NVIDIA" in failed


@pytest.mark.usefixtures("kept_here")
def test_the_process_has_a_limit() -> None:
    started = time.monotonic()
    failed = run(Request([Product(128, 128)], 100, 0, os.getpid()), lambda *_: None, limit_s=0.05)
    assert failed == "the process that compiles ended early"
    assert time.monotonic() - started < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fp8_model(tmp_path, make_llama, [], **LLAMA)
    args = {"model": str(tmp_path / "model"), "dtype": "bfloat16", "quantization": "auto", "ranks": 1, "tokens": 64}
    assert kernels._build_products(argparse.Namespace(**args, jobs=0)) == 0
    said = orjson.loads(capfdbinary.readouterr().out)
    assert said["note"].endswith("FP8 products are left to the first start: there is no GPU")
    assert kernels._build_products(argparse.Namespace(**args | {"quantization": "none"}, jobs=0)) == 0
    assert capfdbinary.readouterr().out == b""
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "none"}))
    assert kernels._build_products(argparse.Namespace(**args, jobs=0)) == 1
    assert "error" in orjson.loads(capfdbinary.readouterr().out)


def test_one_at_a_time_has_the_folder(tmp_path: Path) -> None:
    """flock(2) knows descriptors, not threads: as between processes."""
    order: list[str] = []

    def wait() -> None:
        with alone(tmp_path / "lock"):
            order.append("second")

    with alone(tmp_path / "lock"):
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
