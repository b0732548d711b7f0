"""Figures of the engine on one GPU, two or four, beside the machine's own limits and vLLM's: see docs/gpu.md.

    python benchmarks/gpu/run.py [--gpus N] [--only STAGE ...] [--without STAGE ...] [--append] [--dry-run]

Each stage (`--list`) is a process with a time limit; one that fails is reported and the rest goes on. Stages that would
pass --budget-s are not begun, and named. Writes <--out>/<--name>.json, after each stage, and .png at the end; --append
keeps what is there, if it is of the same device and commit, and runs what is missing. --dry-run runs it on the CPU with
tiny models: its figures mean nothing, so they are judged by nothing and go to build/gpu-dry-run, beside no result that
was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.gpu import show  # noqa: E402
from benchmarks.gpu.stages import BY_GPUS, STAGES, Stage  # noqa: E402

STOP_S = 30.0
TARGETS = Path(__file__).parent / "targets.json"
DRY_RUN = ROOT / "build" / "gpu-dry-run"
PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "apache-tvm-ffi",
    "tokenspeed-flashmla",
    "tokenspeed-deepgemm",
    "libucx-cu13",
)
console = Console(width=None if sys.stdout.isatty() else 165)


def run_stage(stage: Stage, folder: Path, results: dict[str, Any], limit_s: float, dry_run: bool) -> dict[str, Any]:
    """What the stage's process found; `error` with the end of its output where it did not end well."""
    earlier, output, log = folder / "earlier.json", folder / "output.json", folder / f"{stage.name}.log"
    earlier.write_text(json.dumps(results), encoding="utf-8")
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.child", stage.name, str(folder), str(earlier), str(output)]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,  # it ends with this process: the stage stops then
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            reason = f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit_s:.0f} s"
        finally:
            _stop(process)
    if output.is_file():
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found
    return {"error": reason, "log": log.read_text(encoding="utf-8", errors="replace")[-3000:]}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the stage and what it started: kindly first, so that it stops its clusters."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def run_all(
    names: list[str], arguments: argparse.Namespace, results: dict[str, Any], keep: Callable[[], object]
) -> None:
    """Run the stages one after the other, into `results`. `keep` is called after each: a run may be killed."""
    deadline = time.monotonic() + arguments.budget_s
    with tempfile.TemporaryDirectory(prefix="nanodeploy-gpu-") as name:
        for stage in (s for s in STAGES if s.name in names):
            left = deadline - time.monotonic()
            if left < stage.seconds and not arguments.dry_run:
                console.print(f"{stage.name}: left out, {left:.0f} s are left and it takes {stage.seconds}")
                continue
            began = time.monotonic()
            found = run_stage(stage, Path(name), results, min(stage.limit_s, max(left, 20.0)), arguments.dry_run)
            results[stage.name] = found | {"stage_s": round(time.monotonic() - began, 1)}
            console.print(f"{stage.name}: {time.monotonic() - began:.1f} s", highlight=False)
            for part, error in show.errors(found):
                console.print(f"  {part} failed: {error}", markup=False, highlight=False)
            if "log" in found:
                console.print(found["log"], markup=False, highlight=False)
            keep()


def versions() -> dict[str, str]:
    """Of the packages that kernels come from and that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parse() -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=tuple(BY_GPUS), default=1)
    parser.add_argument("--only", nargs="+", choices=names, help="these stages alone, in their own order")
    parser.add_argument("--without", nargs="+", choices=names, default=[])
    parser.add_argument("--budget-s", type=float, default=560.0, help="no stage begins that would end later")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--name", default="", help="of the results; by default gpu, gpu2 or gpu4")
    parser.add_argument("--vllm", type=Path, help="folder of vllm-MODEL.json, measured on this machine")
    parser.add_argument("--append", action="store_true", help="go on with the results that are there")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the stages and the seconds that they take")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.list:
        for stage in STAGES:
            console.print(f"{stage.name:<20} {stage.gpus} GPU, about {stage.seconds} s", highlight=False)
        return
    names = arguments.only or list(BY_GPUS[arguments.gpus])
    names = [name for name in names if name not in arguments.without]
    out = arguments.out or (DRY_RUN if arguments.dry_run else report.RESULTS)
    path = out / f"{arguments.name or ('gpu' if arguments.gpus == 1 else f'gpu{arguments.gpus}')}.json"
    environment = report.environment(device=show.device(arguments.dry_run), dry_run=arguments.dry_run, **versions())
    results: dict[str, Any] = {}
    if arguments.append and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before["environment"][key] == environment[key] for key in ("device", "commit")):
            results = before["results"]
            names = [name for name in names if name in (arguments.only or ()) or show.lacks(results, name)]
        else:
            console.print("--append: the results there are of another device or commit; they are replaced")
    targets = show.with_measured(json.loads(TARGETS.read_text(encoding="utf-8")), arguments.vllm)
    out.mkdir(parents=True, exist_ok=True)

    def keep() -> list[show.Row]:
        rows = show.rows(results, targets)
        if arguments.dry_run:
            rows = [replace(row, wanted=None, wanted_of_limit=None, most=None) for row in rows]
        content = {"environment": environment, "rows": [row.as_dict() for row in rows], "results": results}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return rows

    run_all(names, arguments, results, keep)
    rows = keep()
    show.tables(console, rows, results, targets, environment)
    show.draw(path.with_suffix(".png"), rows, environment)
    console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
