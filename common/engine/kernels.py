"""`python -m common.engine.kernels`: compiles what attention will use, so that an engine's start compiles nothing.

A process of its own, because it imports torch and FlashInfer and prints what they print. Each line of its output is
JSON: {"done", "total"} while files are compiled, then {"kernel", "path"} for each, or {"error"}. The GPU itself is
not needed, but the CUDA toolkit (`nvcc`), a C++ compiler and ninja are. What comes after them for a model does need the
GPU, DeepGEMM's kernels for one in FP8 and Triton's; without one {"note"} says that they are left.

FlashInfer takes its folder and the architectures from its own variables, FLASHINFER_WORKSPACE_BASE (by default the
home folder) and FLASHINFER_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import orjson
import torch

from common.attention import ragged
from common.attention.context import DTYPES
from common.attention.flashinfer import HEAD_DIMS
from common.attention.flashinfer_modules import Compiled, Module, build, wanted
from common.attention.flashinfer_xqa import Xqa
from common.config import EngineConfig, WorkerConfig
from common.engine.build import build_engine
from common.engine.deepgemm_build import Request
from common.engine.fp8_kernels import BUILD_LIMIT_S, products_of, run
from common.errors import NanoDeployError
from common.kernels.gpu import deepgemm
from common.models.checkpoint import INDEX_FILE, SINGLE_FILE
from common.models.spec import ModelSpec
from common.types import MonotonicClock, Role

_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]")


def _spec(model: str) -> ModelSpec | None:
    """Of a checkpoint, or of a folder with its config.json alone: nothing is compiled by weights. None for no model."""
    if not model:
        return None
    has_weights = any((Path(model) / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    return ModelSpec.from_folder(model, weights=has_weights)


def modules_for(model: str, dtype: str, kv_dtypes: list[str], hopper: bool) -> list[Module]:
    """Of a model with heads, or of the usual head sizes. ValueError if FlashInfer does not serve its attention."""
    found: list[Module] = []
    spec = _spec(model)
    if spec is not None and spec.mla is not None:
        return []
    if spec is not None and spec.compress is not None:
        raise ValueError(f"{spec.model_type} attends to compressed entries, not with these kernels")
    if spec is not None and spec.head_dim not in HEAD_DIMS:
        raise ValueError(f"FlashInfer has no kernels for heads of {spec.head_dim}, only {HEAD_DIMS}")
    for kv_dtype in kv_dtypes:
        kv = torch.float8_e4m3fn if kv_dtype == "fp8_e4m3" else DTYPES[dtype]
        for dim in HEAD_DIMS if spec is None else [spec.head_dim]:
            windows, drafts = (spec.cache.has_windows, spec.has_drafts) if spec is not None else (False, False)
            found += wanted(DTYPES[dtype], kv, dim, windows=windows, drafts=drafts, hopper=hopper)
    return list(dict.fromkeys(found))


def xqa_modules_for(model: str, dtype: str, kv_dtypes: list[str], hopper: bool) -> list[Xqa]:
    """For one new token of a model's, or of usual, groups of query heads; blocks of 64 tokens."""
    spec = _spec(model)
    if not hopper or "auto" not in kv_dtypes or (spec is not None and (spec.mla is not None or spec.cache.has_windows)):
        return []
    sizes = [(128, group) for group in (2, 4, 8)]
    if spec is not None:
        sizes = [(spec.head_dim, spec.num_heads // spec.num_kv_heads)]
    return [module for module in (Xqa(DTYPES[dtype], *size, 64) for size in sizes) if module.can]


def latent_modules_for(model: str, dtype: str, hopper: bool) -> list[ragged.Module]:
    """For prompts of a model with latent attention, or of the usual one."""
    spec = _spec(model)
    if not hopper or (spec is not None and spec.mla is None):
        return []
    widths = (192, 128) if spec is None or spec.mla is None else (spec.mla.qk_dim, spec.mla.v_dim)
    return [ragged.Module(DTYPES[dtype], *widths)] if widths in ragged.WIDTHS else []


def main() -> int:
    """Returns the exit code: 0, or 1 after an error was said."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--kv-dtype", nargs="+", default=["auto", "fp8_e4m3"])
    parser.add_argument("--hopper", action="store_true")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--quantization", default="auto", choices=["auto", "fp8", "none"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    if importlib.util.find_spec("flashinfer") is None:
        _say({"error": "flashinfer is not installed: there is nothing to compile"})
        return 1
    try:
        modules: list[Compiled] = [*modules_for(args.model, args.dtype, args.kv_dtype, args.hopper)]
        modules += xqa_modules_for(args.model, args.dtype, args.kv_dtype, args.hopper)
        modules += latent_modules_for(args.model, args.dtype, args.hopper)
        built = build(modules, args.jobs, _on_line)
    except Exception as error:  # noqa: BLE001  the edge of this process: what failed is said in its one way
        _say({"error": str(error)})
        return 1
    for module in modules:
        _say({"kernel": module.name, "path": str(module.path), "built": module in built})
    failed = _build_products(args) if args.model and args.hopper else 0
    if args.model and not failed:
        options = {"dtype": args.dtype, "quantization": args.quantization, "tensor_parallel_size": args.ranks}
        start_engines(args.model, args.kv_dtype, "cuda", options | {"max_num_batched_tokens": args.tokens})
    return failed


def start_engines(model: str, kv_dtypes: list[str], device: str, options: dict[str, Any]) -> None:
    """Start an engine with drawn weights for each type of cache, and end it: what Triton compiles for it is kept.

    It computes all sizes that choose a kernel (`common.engine.gpu_memory.run_steps`), and hands KV over to itself
    (`common.engine.selftest`). `options`: of `EngineConfig`. What cannot be started here is said and left to the first
    start.
    """
    if device == "cuda" and not torch.cuda.is_available():
        _say({"note": "Triton's kernels are left to the first start: there is no GPU"})
        return
    for kv_dtype in kv_dtypes:
        engine = EngineConfig(model=model, load_format="dummy", device=device, kv_dtype=kv_dtype, **options)
        config = WorkerConfig(engine=engine)
        _say({"note": f"starting an engine with drawn weights, kv_dtype {kv_dtype}, for Triton's kernels"})
        try:
            build_engine(config, Role.DECODE, MonotonicClock(), lambda *_: None).close()
        except NanoDeployError as error:
            _say({"note": f"its kernels are left to the first start: {error.message}"})
        else:
            _say({"note": "they are there"})


def _build_products(args: argparse.Namespace) -> int:
    """DeepGEMM's kernels of a model in FP8. Returns the exit code."""
    try:
        spec = _spec(args.model)
        assert spec is not None
        products = products_of(spec, args.dtype, args.quantization, args.ranks)
    except NanoDeployError as error:
        _say({"error": error.message})
        return 1
    if not products:
        return 0
    reason = "there is no GPU" if not torch.cuda.is_available() else deepgemm.unavailable()
    if reason:
        _say({"note": f"DeepGEMM's kernels of {len(products)} FP8 products are left to the first start: {reason}"})
        return 0
    request = Request(products, args.tokens, 0, os.getpid(), args.jobs)
    failed = "" if request.is_done(torch.cuda.get_device_name()) else run(request, _on_kernels, BUILD_LIMIT_S)
    if failed:
        _say({"error": f"DeepGEMM's kernels are not built: {failed}"})
        return 1
    _say({"note": f"{deepgemm.folder()}: DeepGEMM's kernels of {len(products)} FP8 products are there"})
    return 0


def _on_kernels(done: int, total: int) -> None:
    _say({"done": done, "total": total})


def _on_line(line: str) -> None:
    if at := _PROGRESS.match(line):
        _say({"done": int(at[1]), "total": int(at[2])})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(what, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
