"""Does KV move from GPU to GPU between two processes of this machine? A process with torch finds out."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

import services
from common.config.schema import UcxConfig
from common.engine.gpus import has_driver
from services.cli.doctor.finding import Finding, fail, note, ok, skip

WANTED = "ucx/cuda_ipc"
_FIX = "see the message; --device cpu does without"


class Checked(msgspec.Struct, frozen=True):
    """What `common.kvtransfer.gpu_check` prints."""

    over: str
    gpus: int
    nbytes: int
    moved_gbps: float
    verified_gbps: float
    error: str


async def transfer() -> Finding:
    """Read and verify a child's blocks a few times; the best of them counts."""
    if not has_driver():
        return skip("no NVIDIA driver")
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "common.kvtransfer.gpu_check",
        UcxConfig().model_dump_json(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(services.__file__).parent.parent,
    )
    try:
        out, said = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
    try:
        checked = msgspec.json.decode(out.splitlines()[-1] if out else b"", type=Checked)
    except msgspec.DecodeError:
        return fail(f"no answer: {said.decode(errors='replace').strip()[-500:]}", _FIX)
    if checked.error:
        return fail(checked.error, _FIX)
    detail = (
        f"{checked.nbytes >> 20} MiB from GPU to GPU over {checked.over} at {checked.moved_gbps:.0f} GB/s,"
        f" {checked.verified_gbps:.0f} with digests, on {checked.gpus} GPU{'s' * (checked.gpus > 1)}"
    )
    if checked.over != WANTED:
        return note(detail, f"{WANTED} is not possible: do the processes share a machine and a PID namespace?")
    return ok(detail)
