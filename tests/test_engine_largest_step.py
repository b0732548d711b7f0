"""What an engine on a GPU runs before it serves: all that would be compiled later, when requests come together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from engine_support import Solo, llama
from mtp_support import make_mtp
from worker_support import ManualClock

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.batch import Batch, RowMasks, SampleRow
from common.engine.compute import _attention, _size_for_gpu, _smallest_sizing, make_compute
from common.engine.draft_runner import DraftRunner
from common.engine.gpu_memory import powers, run_draft_layer, run_steps
from common.engine.runner import ModelRunner, Pending
from common.engine.sampler import Sampler
from common.engine.sizing import MIN_MODEL_LEN, resolve_engine, size_engine
from common.errors import ConfigError
from common.kvcache.layout import FULL_GROUP, GroupSpec, Retention
from common.models.spec import ModelSpec
from common.models.weights import load_model
from common.parallel.mesh import alone
from common.types import Role

__all__ = ["llama"]

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("max_seqs", "counts", "max_draws", "verified"),
    [
        (48, [1, 2, 4, 8, 16, 32, 48], 1, []),
        (48, [1, 2, 4, 8, 16, 32, 48], 4, [(25, 100, 60, 100)]),
        (16, [1, 2, 4, 8, 16], 4, [(16, 64, 60, 64)]),
        (1, [1], 2, [(1, 2, 60, 2)]),
    ],
)
def test_each_range_of_sizes_has_been_computed_before_it_serves(
    max_seqs: int,
    counts: list[int],
    max_draws: int,
    verified: list[tuple[int, int, int, int]],
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    solo = Solo(llama)
    runner = solo.decode.parts.runner
    assert isinstance(runner, ModelRunner)
    forward, sample = runner.forward, runner.sample
    steps: list[tuple[int, int, int, int]] = []  # sequences, new tokens, tokens that the last one sees, draws

    def observed(batch: Batch) -> Pending:
        pending = forward(batch)
        assert pending.logits_RV is not None
        steps.append((len(batch.rows), len(batch.input_ids_T), batch.max_seq_len, len(pending.logits_RV)))
        return pending

    def masked(pending: Pending, masks: RowMasks | None = None) -> None:
        assert masks is not None
        assert len(masks.rows_G) == len(pending.sample_rows)
        sample(pending, masks)
        assert pending.result is not None
        assert not pending.result.failures

    runner.forward, runner.sample = observed, masked  # type: ignore[method-assign]
    layout = solo.decode.parts.layout
    sizes = {"max_tokens": 100, "max_seqs": max_seqs, "longest": 60, "max_model_len": 130, "max_draws": max_draws}
    run_steps(runner, layout, **sizes)
    assert steps == [
        (2, 120, 60, 2),
        *((count, count + more, 60, count) for count in counts for more in range(min(count, 2))),
        *verified,
        *((1, num_new, 130, num_new) for num_new in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
        *((rows, new, seen, rows) for seen in (16, 32, 64, 128) for rows, new in ((1, 1), (1, 2), (2, 3))),
    ]


def test_so_has_the_draft_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few new tokens behind many too: these are kernels of their own, and the last of a prompt may be few."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    engine = EngineConfig(
        model=str(make_mtp(tmp_path / "model")),
        device="cpu",
        kv_cache_memory_bytes=1 << 22,
        max_num_batched_tokens=20,
        max_model_len=100,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},  # type: ignore[arg-type]
    )
    config = WorkerConfig(engine=resolve_engine(engine), handoff=HandoffConfig(transports=("memory",)))
    made = make_compute(config, Role.DECODE, alone(CPU), ManualClock())
    drafts, group = made.draft_runner, made.layout.group(FULL_GROUP)
    assert drafts is not None
    passes: list[tuple[int, int]] = []  # new tokens, tokens that the last one sees
    compute = drafts.compute

    def observed(num_new: int, start: int, table: Sequence[int]) -> None:
        compute(num_new, start, table)
        passes.append((num_new, start + num_new))

    drafts.compute = observed  # type: ignore[method-assign]
    run_draft_layer(drafts, msgspec.structs.replace(group, num_blocks=2), longest=20, max_model_len=100)
    assert passes == [
        *((num_new, 100) for num_new in (1, 2, 3, 4, 5, 6, 7, 8, 16, 20)),
        *((num_new, seen) for seen in (16, 32, 64) for num_new in (1, 2)),
    ]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Sizes a decode engine with drafts; its GPU has seen a peak of a MiB for each that was `counted` so far."""
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))

    def size(counted: list[int], **options: Any) -> int:
        """MiB that are kept for steps."""
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(counted, default=0) << 20)
        engine = resolve_engine(EngineConfig(model=str(make_mtp(tmp_path / "model")), device="cpu", **options))
        sizing = size_engine(engine, ModelSpec.from_folder(engine.model), Role.DECODE)
        model = load_model(sizing.spec, dtype=sizing.dtype, device=CPU)
        backend, sampler = _attention(engine, sizing, CPU), Sampler(sizing.spec.vocab_size, CPU)
        sized = _size_for_gpu(engine, sizing.spec, Role.DECODE, alone(CPU), sizing, model, backend, sampler, 0)
        return (int(0.9 * (1 << 30)) - sized.budget_nbytes) >> 20

    return size


def test_its_passes_are_measured_with_the_steps(measured: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    compute = DraftRunner.compute

    def observed(self: DraftRunner, num_new: int, start: int, table: Sequence[int]) -> None:
        compute(self, num_new, start, table)
        passes.append(num_new)

    monkeypatch.setattr(DraftRunner, "compute", observed)
    drafting = {"method": "mtp", "num_speculative_tokens": 1}
    sizes = {"max_num_batched_tokens": 20, "max_num_seqs": 4, "max_model_len": 100}
    assert measured(passes, speculative_config=drafting, **sizes) == 20


@pytest.mark.parametrize(("method", "rows"), [("none", 32), ("ngram", 48)])
def test_so_are_the_draws_that_verify_drafts(
    method: str, rows: int, measured: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of all drafts of all sequences at once."""
    drawn: list[int] = []
    sample = Sampler.sample

    def observed(self: Sampler, logits_RV: torch.Tensor, rows: Sequence[SampleRow], masks: RowMasks | None) -> Any:
        drawn.append(len(logits_RV))
        return sample(self, logits_RV, rows, masks)

    monkeypatch.setattr(Sampler, "sample", observed)
    drafting = {"method": method, "num_speculative_tokens": 3}
    sizes = {"max_num_batched_tokens": 60, "max_num_seqs": 12, "max_model_len": 100}
    assert measured(drawn, speculative_config=drafting, **sizes) == rows


def test_a_draft_layer_that_has_no_room_is_a_refused_start() -> None:
    def full(num_new: int, start: int, table: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. If reserved but unallocated memory is large ...")

    drafts: Any = SimpleNamespace(compute=full)
    group = GroupSpec(name=FULL_GROUP, retention=Retention.FULL, block_size=16, num_blocks=8)
    with pytest.raises(ConfigError, match=r"no room for the draft layer: CUDA out of memory\.$") as raised:
        run_draft_layer(drafts, group, longest=20, max_model_len=100)
    assert raised.value.param == "max_num_batched_tokens"


@pytest.mark.parametrize(("max_tokens", "length"), [(1, MIN_MODEL_LEN), (20, 20)])
def test_the_pool_of_these_steps_is_for_a_sequence_that_an_engine_may_have(
    max_tokens: int, length: int, llama: Path
) -> None:
    engine = resolve_engine(EngineConfig(model=str(llama), device="cpu", max_num_batched_tokens=max_tokens))
    small = _smallest_sizing(engine, ModelSpec.from_folder(llama), Role.DECODE, 0, max_tokens)
    assert small.max_model_len == length


def test_each_kernel_of_few_rows_takes_a_power_of_two() -> None:
    """Of `common.kernels.gpu.linear`: one for each number up to the first limit, then for each power of two."""
    text = (ROOT / "common/kernels/gpu/linear.py").read_text(encoding="utf-8")
    in_registers, most = (
        int(re.search(rf"^{name} = (\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("MAX_ROWS_IN_REGISTERS", "MAX_ROWS")
    )

    def kernel(rows: int) -> int:
        return rows if rows <= in_registers else max(16, 1 << (rows - 1).bit_length())

    assert {kernel(rows) for rows in range(1, most + 1)} == {kernel(rows) for rows in powers(most)}
