"""DeepGEMM's kernels of a model, compiled before it is loaded: which products it makes, and the process that compiles.

DeepGEMM compiles a kernel, for about 4 s, where it meets a weight's shape with a number of rows for which it would cut
the product otherwise than before: at start, and between two steps of a server that meets a prompt of a new length. So
all of a model are compiled at once, in parallel, by a process of its own (`common.engine.deepgemm_build`); what it
makes lies in DeepGEMM's folder, and a file beside it says that nothing is missing.

A process that fails is no reason not to start: its reason goes to the log, and kernels are compiled when they are met.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

import orjson
import torch

from common.attention.context import DTYPES
from common.engine.deepgemm_build import Product, Request
from common.errors import ConfigError
from common.kernels import gpu
from common.kernels.gpu import deepgemm
from common.layers.base import Build, TensorParallel
from common.layers.linear import ColumnLinear, RowLinear
from common.layers.moe import Experts
from common.models.decoder import DecoderModel
from common.models.fp8_choice import FP8Choice
from common.models.registry import model_class
from common.models.spec import ModelSpec
from common.models.weights import drawn_slots, keeps_fp8
from common.telemetry import get_logger

log = get_logger(__name__)

START_LIMIT_S, BUILD_LIMIT_S = 500.0, 3600.0
"""Of the process at an engine's start, which says nothing while another compiles the same, and of the command."""


def products_of(spec: ModelSpec, dtype: str, quantization: str, ranks: int) -> list[Product]:
    """What a rank of a model multiplies in FP8 on a GPU. From its config alone; ConfigError for one that cannot be."""
    if not keeps_fp8(spec.quant, quantization, dtype, torch.device("cuda")):
        return []
    in_fp4 = spec.quant is not None and spec.quant.fp4_experts
    tp = TensorParallel(0, ranks, lambda partial: partial)
    build = Build(DTYPES[dtype], torch.device("meta"), tp, fp8_linears=True, fp8_experts=not in_fp4)
    try:
        model: DecoderModel = model_class(spec.model_type)(spec, build, 1)
    except ValueError as e:
        raise ConfigError(f"{spec.model_type} cannot be split over {ranks} ranks: {e}") from None
    choice = FP8Choice(spec.quant, quantization == "fp8", build.dtype, rank=0, ranks=ranks)
    left = {id(holder) for one in choice.sort_out(drawn_slots(model.slots()), None) for holder in one.holders}
    top_k = spec.moe.top_k if spec.moe is not None else 0
    found: dict[Product, None] = {}
    for slot in model.slots():
        holder = slot.holder
        if holder is None or not holder.in_fp8 or id(holder) in left:
            continue
        if isinstance(holder, ColumnLinear | RowLinear):
            found[Product(*holder.weight.shape)] = None
        elif isinstance(holder, Experts):
            for weight in holder.weights[:2]:
                experts, n, k = weight.shape
                found[Product(n, k, experts, top_k)] = None
    return [product for product in found if product.can]


def compile_beforehand(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    *,
    ranks: int,
    tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """All kernels for steps of up to `tokens`, if DeepGEMM serves here. Another rank's process may be the one."""
    products = products_of(spec, dtype, quantization, ranks)
    if not products or gpu.unavailable() or deepgemm.unavailable():
        return
    request = Request(products, tokens, device.index or 0, os.getpid())
    if request.is_done(torch.cuda.get_device_name(device)):
        return
    log.info("FP8 kernels are compiled now; `nanodeploy kernels build` does it beforehand", products=len(products))
    failed = run(request, progress)
    if failed:
        log.warning("FP8 kernels are not all there and will be compiled when they are met", reason=failed)


@dataclass
class _Said:
    error: str = "the process that compiles ended early"


def run(request: Request, progress: Callable[[int, int], None], limit_s: float = START_LIMIT_S) -> str:
    """The process that compiles: why it failed, or nothing. It ends with this one."""
    said = _Said()
    command = [sys.executable, "-m", "common.engine.deepgemm_build"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(orjson.dumps(asdict(request)))
            process.stdin.close()
            for line in process.stdout:
                _take(orjson.loads(line), said, progress)
    except BrokenPipeError:  # it ended before it had read
        pass
    finally:
        timer.cancel()
    return said.error


def _take(line: dict[str, object], said: _Said, progress: Callable[[int, int], None]) -> None:
    if "total" in line:
        progress(int(str(line["done"])), int(str(line["total"])))
    elif "built" in line:
        said.error = ""
    elif "error" in line:
        said.error = str(line["error"])
