"""The GPU benchmark: its arithmetic, how it judges, and one dry run on the CPU, since a GPU is rarely at hand."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from benchmarks.gpu import show
from benchmarks.gpu.arithmetic import Shape, prompt_flops, step_nbytes
from benchmarks.gpu.ideal import first_come
from benchmarks.gpu.shapes import SHAPES, with_tokenizer, write_model
from benchmarks.gpu.stages import BY_GPUS, STAGES, outcome
from common.models.spec import ModelSpec
from common.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TARGETS = json.loads((ROOT / "benchmarks/gpu/targets.json").read_text(encoding="utf-8"))


def test_limits_are_those_of_the_published_table() -> None:
    """3.9 and 13.9 ms for Qwen3-8B at 4.27 TB/s and a context of 1152."""
    shape = SHAPES["qwen3-8b"]
    assert step_nbytes(shape, 1, 1152) / 4.27e9 == pytest.approx(3.9, abs=0.05)
    assert step_nbytes(shape, 256, 1152) / 4.27e9 == pytest.approx(13.9, abs=0.2)
    assert Shape.of(SHAPES["qwen3-30b-a3b"]).weights == pytest.approx(30.5e9, rel=0.01)
    assert prompt_flops(shape, 1024) == pytest.approx(2 * 6.95e9 * 1024, rel=0.05)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_every_shape_is_a_model_that_is_read(tmp_path: Path, name: str, dry_run: bool) -> None:
    folder = write_model(tmp_path, name, dry_run=dry_run)
    spec = ModelSpec.from_folder(folder, weights=False)
    assert spec.num_layers == (2 if dry_run else SHAPES[name]["num_hidden_layers"])


def test_made_up_tokenizer_gives_text_for_every_token(tmp_path: Path) -> None:
    folder = with_tokenizer(write_model(tmp_path, "qwen3-0.6b", dry_run=True))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode([300, 301], skip_special_tokens=False) == " w44 w45"
    assert tokenizer.encode("Why?", add_special_tokens=False)


def test_ideal_queue() -> None:
    assert first_come([0.0, 0.1, 2.0], 1.0) == pytest.approx([1.0, 1.9, 1.0])


def test_rows_are_judged_by_what_the_machine_can_do() -> None:
    half = {name: value / 2 for name, value in TARGETS["limits"].items()}
    step = {"mean": 10.36, "nbytes": 3.9e-3 * half["copy_gbps"] * 1e9}
    results = {"limits": half, "qwen3-8b": {"decode": {"1": step}, "nano": {"error": "out of memory"}}}
    (row,) = [row for row in show.rows(results, TARGETS) if row.group == "qwen3-8b"]
    assert row.scaled == pytest.approx(2 * 5.18)
    assert row.of_vllm == pytest.approx(1.0)
    assert row.of_limit == pytest.approx(3.9 / 10.36)
    assert row.met is False
    assert show.errors(results["qwen3-8b"]) == [("nano", "out of memory")]


def test_separation_stands_beside_both_of_vllms_ways() -> None:
    load = {"ttft_p50_ms": 200.0, "ttft_p99_ms": 300.0, "tpot_p50_ms": 6.0, "gap_p99_ms": 11.0, "ideal_p50_ms": 190.0}
    results = {"apart": {"8/s": load | {"ideal_p99_ms": 270.0}}}
    rows = {(row.group, row.what): row for row in show.rows(results, TARGETS)}
    assert rows["apart, 8/s", "ttft p50"].vllm == 419
    assert [rows["apart, 8/s", what].met for what in ("ttft p50", "ttft p99", "gap p99")] == [True, False, False]
    beside = [row for (group, _), row in rows.items() if group == "the same, vLLM: 2 replicas, 8/s"]
    assert [row.vllm for row in beside] == [111, 240, 9.1, 83]
    assert {row.met for row in beside} == {None}


def test_the_queue_of_a_card_at_its_power_limit_is_told_beside() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    found = {"apart": {"8/s": {"loaded_ideal_p50_ms": 311.2, "loaded_ideal_p99_ms": 839.9}, "service_ms": 103.9}}
    show.tables(console, [], found, TARGETS, {"device": "a GPU", "commit": "0", "date": "2026-11-27"})
    assert "apart, 8/s, an ideal queue of prompts without a pause (ms): p50 311, p99 840" in console.export_text()


def test_figures_of_this_machine_are_not_scaled(tmp_path: Path) -> None:
    (tmp_path / "vllm-qwen3-8b.json").write_text(json.dumps({"nano": 5000.0, "step_ms": {"1": 6.0}}), encoding="utf-8")
    targets = show.with_measured(TARGETS, tmp_path)
    half = {name: value / 2 for name, value in TARGETS["limits"].items()}
    results = {"limits": half, "qwen3-8b": {"nano": {"tokens_per_s": 6000.0}}}
    (row,) = [row for row in show.rows(results, targets) if row.group == "qwen3-8b"]
    assert row.of_vllm == pytest.approx(1.2)
    assert row.met is True


def test_a_suite_that_was_cut_off_is_counted_and_one_that_failed_is_an_error() -> None:
    assert outcome(2, "!!! KeyboardInterrupt !!!\n41 passed, 2 skipped in 150.10s") == {
        "exit_code": 2,
        "passed": 41,
        "skipped": 2,
    }
    found = outcome(1, "1 failed, 40 passed, 3 errors in 9.1s")
    assert show.errors(found) == [("stage", "1 failed, 3 error")]
    assert found["passed"] == 40


def test_stages_have_names_of_their_own_and_fit_ten_minutes() -> None:
    seconds = {stage.name: stage.seconds for stage in STAGES}
    assert len(seconds) == len(STAGES)
    assert all(sum(seconds[name] for name in BY_GPUS[gpus]) <= 560 for gpus in (2, 4))
    assert {name for names in BY_GPUS.values() for name in names} == set(seconds)


def test_dry_run_measures_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/run.py", "--dry-run", "--out", str(tmp_path), "--only"]
    done = subprocess.run(
        [*command, "limits", "tests", "qwen3-0.6b", "fp8-accuracy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert all(row["met"] is None for row in written["rows"]), "its figures mean nothing"
    tests = written["results"]["tests"]
    assert set(tests) == {"exit_code", "skipped", "stage_s"}, "a test of the GPU did not skip"
    assert tests["exit_code"] == 0
    parts = written["results"]["qwen3-0.6b"]
    assert {"ready", "decode", "prefill", "nano", "batch"} <= set(parts)
    assert not show.errors(parts)
    assert 0.99 < written["results"]["fp8-accuracy"]["latent"]["ratio"] < 1.01
    assert (tmp_path / "gpu.png").is_file()


def words_of(process: psutil.Process) -> list[str]:
    """Of its command."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_stage_ends_with_the_one_who_started_it(tmp_path: Path) -> None:
    """A run that is killed must not leave a stage that holds the GPU. The stage has a cluster of its own. What was
    measured before is kept."""
    command = [sys.executable, "benchmarks/gpu/run.py", "--dry-run", "--out", str(tmp_path), "--only", "limits", "http"]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    run = psutil.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not any("services.cli.main" in words_of(process) for process in started):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
        started = run.children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
    assert list(tmp_path.rglob("earlier.json"))
    assert not list(tmp_path.rglob("output.json")), "the stage went on to its end"
    assert list(json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["results"]) == ["limits"]
