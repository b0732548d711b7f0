"""`nanodeploy kernels build`: kernels compiled beforehand, by a process that may import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from rich.console import Console

from services.cli import child
from services.cli.report import bars


@dataclass(frozen=True)
class Build:
    """What is compiled: for GPUs of compute capability `arch` (such as 9.0a) what `model`, or any usual one, needs.

    `ranks`, `quantization`: as its engines will have them. `tokens`: of the longest step.
    """

    model: str
    dtype: str
    kv_dtypes: Sequence[str]
    arch: str
    num_jobs: int
    quantization: str
    ranks: int
    tokens: int


def run_build(build: Build, console: Console) -> int:
    """Compile it. Returns the exit code."""
    command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), sys.executable]
    command += ["-m", "common.engine.kernels", "--dtype", build.dtype, "--kv-dtype", *build.kv_dtypes]
    command += ["--model", build.model, "--jobs", str(build.num_jobs), "--quantization", build.quantization]
    command += ["--ranks", str(build.ranks), "--tokens", str(build.tokens)]
    command += ["--hopper"] if build.arch.startswith("9.") else []
    env = os.environ | {"FLASHINFER_CUDA_ARCH_LIST": build.arch}
    failed = ""
    with bars(console) as tell, subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = _parse(line)
            if "total" in said:
                tell("compiling", said["done"], said["total"])
            elif "kernel" in said:
                state = "built" if said["built"] else "there already"
                console.print(f"{said['path']}: {state}", highlight=False, soft_wrap=True)
            elif "note" in said:
                console.print(said["note"], highlight=False, soft_wrap=True, markup=False)
            failed = said.get("error", failed)
    if failed:
        console.print(failed, style="red", highlight=False, soft_wrap=True, markup=False)
    return process.returncode


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the child; others that share its output with it print too."""
    try:
        said = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}
