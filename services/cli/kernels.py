"""`nanodeploy kernels build`: attention kernels compiled beforehand, by a process that may import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import orjson
from rich.console import Console

from services.cli import child
from services.cli.report import bars


def run_build(model: str, dtype: str, kv_dtypes: Sequence[str], arch: str, num_jobs: int, console: Console) -> int:
    """Compile for GPUs of compute capability `arch` (such as 9.0a) what `model`, or any usual one, needs.

    Returns the exit code.
    """
    command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), sys.executable]
    command += ["-m", "common.engine.kernels", "--dtype", dtype, "--kv-dtype", *kv_dtypes]
    command += ["--model", model, "--jobs", str(num_jobs), *(["--hopper"] if arch.startswith("9.") else [])]
    env = os.environ | {"FLASHINFER_CUDA_ARCH_LIST": arch}
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
