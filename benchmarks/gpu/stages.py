"""What `run.py` can measure, in the order in which it does: each stage is a process of its own, with a time limit.

A stage that dies or outlives its limit is reported and the next one begins, with the whole GPU to itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT

Result = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """`folder`: where models are written. `earlier`: results of stages that have run, by name."""

    folder: Path
    dry_run: bool
    earlier: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """`seconds`: about what it takes; it is stopped after `limit_s`, and not begun when `seconds` do not fit."""

    name: str
    gpus: int
    seconds: int
    limit_s: int
    call: Callable[[Context], Result]


def offline(shape: str, *parts: str, **options: Any) -> Callable[[Context], Result]:
    """Parts of `benchmarks.gpu.offline` on one engine. `config` of the options goes into the config.json."""
    overrides = options.pop("config", {})

    def call(context: Context) -> Result:
        from benchmarks.gpu import offline as measured
        from benchmarks.gpu.shapes import write_model

        folder = write_model(context.folder, shape, dry_run=context.dry_run, **overrides)
        given = {key: value for key, value in options.items() if not (context.dry_run and key in _GPU_ONLY)}
        return measured.measure(shape, folder, parts, dry_run=context.dry_run, options=given)

    return call


_GPU_ONLY = ("max_model_len", "tensor_parallel_size")  # sizes that a dry run has no room for


def limits(context: Context) -> Result:
    from benchmarks.gpu.limits import measure

    return measure(dry_run=context.dry_run)


def tests(context: Context) -> Result:
    """The suite of the GPU, whole engines first: nothing is measured of kernels that are wrong.

    It is longer than the time that it has here: what was run by then is counted, and `cut_off_s` says that it was not
    all. In a dry run all of it is skipped, for the reason that pytest prints.
    """
    folder = ROOT / "tests" / "gpu"
    first = [folder / name for name in _FIRST_TESTS]
    files = [*first, *(path for path in sorted(folder.glob("test_*.py")) if path not in first)]
    options = ("-m", "gpu", "-q", "--maxfail=30", "-p", "no:cacheprovider")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *map(str, files), *options],
        cwd=ROOT,
        env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if context.dry_run else {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    cut: Result = {}
    try:
        output, _ = process.communicate(timeout=_TESTS_S)
    except subprocess.TimeoutExpired:
        cut = {"cut_off_s": _TESTS_S}
        process.send_signal(signal.SIGINT)  # it ends its test, and counts
        output, _ = process.communicate()
    print(output[-6000:])
    return outcome(process.returncode, output) | cut


def outcome(exit_code: int, output: str) -> Result:
    """Of a run of pytest: its counts, and an `error` where a test failed."""
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", output)
    counts = {word: int(n) for n, word in found}
    wrong = {word: counts.pop(word) for word in ("failed", "error") if word in counts}
    if wrong:
        counts |= {"error": ", ".join(f"{n} {word}" for word, n in wrong.items())}
    return {"exit_code": exit_code, **counts}


def script(name: str, result: str, *arguments: str) -> Callable[[Context], Result]:
    """Another benchmark of this folder's parent, and what it wrote."""

    def call(context: Context) -> Result:
        if context.dry_run:
            return {"outcome": "not run in a dry run"}
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *arguments], cwd=ROOT, check=True)
        found: Result = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))
        return found

    return call


def accuracy(context: Context) -> Result:
    from benchmarks.gpu.accuracy import measure

    return measure(dry_run=context.dry_run)


def http(context: Context) -> Result:
    from benchmarks.gpu import served
    from benchmarks.gpu.shapes import with_tokenizer, write_model

    folder = with_tokenizer(write_model(context.folder / "served", "qwen3-8b", dry_run=context.dry_run))
    return served.http(folder, dry_run=context.dry_run)


def apart(context: Context) -> Result:
    from benchmarks.gpu import served
    from benchmarks.gpu.shapes import with_tokenizer, write_model

    folder = with_tokenizer(write_model(context.folder / "served", "qwen3-8b", dry_run=context.dry_run))
    alone = context.earlier.get("tp1", {}).get("one_prompt", {})
    return served.apart(folder, alone.get("ms", 0.0), alone.get("sustained_ms", 0.0), dry_run=context.dry_run)


_FIRST_TESTS = ("test_engine_gpu.py", "test_deterministic.py")
_TESTS_S = 150.0
_ALL = ("ready", "decode", "prefill", "nano", "batch")
_DRAFTS = {"num_speculative_tokens": 3}
_TRAINED = "speculation_gpu"
_LONG = {"max_model_len": 20_000, "max_num_seqs": 64}
_CONTEXTS = {"max_model_len": 66_000, "max_num_seqs": 16, "enable_prefix_caching": True}
_TRAINED_ENGINES = ("none", "mtp 1", "mtp 2", "mtp 3")
_MOONLIGHT = "moonlight-16b-a3b"
STAGES = (
    Stage("limits", 1, 15, 60, limits),
    Stage("tests", 1, 160, 200, tests),
    Stage("qwen3-8b", 1, 80, 170, offline("qwen3-8b", *_ALL)),
    Stage("http", 1, 75, 200, http),
    Stage("qwen3-0.6b", 1, 45, 120, offline("qwen3-0.6b", *_ALL)),
    Stage(_MOONLIGHT, 1, 70, 150, offline(_MOONLIGHT, *_ALL)),
    Stage("moonlight-same-experts", 1, 45, 120, offline(_MOONLIGHT, "same_experts", "decode", "nano", "batch")),
    Stage("qwen3-30b-a3b", 1, 100, 200, offline("qwen3-30b-a3b", *_ALL)),
    Stage("deterministic", 1, 60, 150, offline("qwen3-8b", "decode", "batch", deterministic=True)),
    Stage("long", 1, 50, 120, offline("qwen3-8b", "ready", "long_context", **_LONG)),
    Stage("long-fp8", 1, 50, 120, offline("qwen3-8b", "ready", "long_context", kv_dtype="fp8_e4m3", **_LONG)),
    Stage("moonlight-fp8", 1, 30, 90, offline(_MOONLIGHT, "ready", kv_dtype="fp8_e4m3")),
    Stage("fp8-accuracy", 1, 60, 200, accuracy),
    Stage("drafts", 1, 50, 120, offline("qwen3-8b", "drafts", speculative_config={"method": "ngram", **_DRAFTS})),
    Stage(
        "drafts-mtp",
        1,
        50,
        120,
        offline(
            _MOONLIGHT,
            "drafts",
            speculative_config={"method": "mtp", **_DRAFTS},
            config={"num_nextn_predict_layers": 1},
        ),
    ),
    Stage(
        "speculation",
        1,
        100,
        200,
        script(
            "speculation.py",
            _TRAINED,
            *("--device", "cuda", "--name", _TRAINED, "--rounds", "1", "--engines", *_TRAINED_ENGINES),
        ),
    ),
    Stage("sparse", 1, 80, 180, offline("deepseek-v3.2-cut", "by_context", **_CONTEXTS)),
    Stage("dense", 1, 90, 180, offline("deepseek-v3.2-cut", "by_context", sparse_attention=False, **_CONTEXTS)),
    Stage("tp1", 2, 60, 130, offline("qwen3-8b", "ready", "one_prompt", "decode", "prefill")),
    Stage("apart", 2, 200, 330, apart),
    Stage("transfer", 2, 40, 80, script("kv_transfer_gpu.py", "kv_transfer_gpu")),
    Stage("tp2", 2, 70, 160, offline("qwen3-8b", "ready", "one_prompt", "decode", "prefill", tensor_parallel_size=2)),
    Stage("tp4", 4, 60, 150, offline("qwen3-8b", "ready", "one_prompt", "decode", "prefill", tensor_parallel_size=4)),
)
BY_GPUS = {
    1: tuple(stage.name for stage in STAGES if stage.gpus == 1),
    2: ("limits", *(stage.name for stage in STAGES if stage.gpus == 2)),
    4: ("limits", "tp1", "tp2", "tp4"),
}
