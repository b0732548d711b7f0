"""Runs a batch on the device: forward, sample, collect (architecture, decision 5).

    pending = forward(batch) -> sample(pending) -> collect(pending)
                         `----------------`------> drop(pending)

The three are apart so that a device may overlap them with the next step's planning; on CPU they happen
back to back. A step may read tokens that the step before has drawn and nobody has collected: they stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attention.context import AttentionBackend, AttentionContext
from common.engine.batch import Batch, BatchMedia, RowMasks, SampleRow
from common.engine.graphs import DecodeGraphs, known_or_drawn
from common.engine.inputs import HostInputs, Inputs, PinnedInputs, arrays_of, context_of
from common.engine.logprobs import PromptLogprobs, prompt_logprobs
from common.engine.recorded_head import RecordedHead
from common.engine.results import Fetched
from common.engine.sampler import NOT_FINITE, Sampler, SampleResult
from common.kernels import gpu
from common.kernels.draws import sent
from common.kvcache.pool import KVPool
from common.kvcache.tables import BlockCopy
from common.layers.step import StepMedia
from common.types import TokenLogprobs

PROMPT_LOGPROB_ROWS = 256  # logits of a whole chunk of prompt would take gigabytes


class CausalModel(Protocol):
    """The face of every model family."""

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext, media: StepMedia | None = None
    ) -> Tensor:
        """Hidden rows [T, hidden] before the final norm."""

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Final norm and head: float32 [R, vocab]."""

    def norm(self, hidden_RD: Tensor) -> Tensor:
        """Final norm alone."""


@dataclass
class Pending:
    """A step on the device. Sampled rows are the `samples` of the batch's rows, in order."""

    batch: Batch
    hidden_TD: Tensor | None
    logits_RV: Tensor | None
    sample_rows: Sequence[SampleRow]
    prompt_logprobs: dict[int, list[PromptLogprobs]]
    result: SampleResult | None = None
    ran: Fetched | None = None  # where nothing is drawn: there when all is computed
    pooled: Fetched | None = None  # float32 rows [R, D] of the batch's rows that pool, in order
    tails: Fetched | None = None  # bool [R] of the batch's rows with a tail to write, in order: is it of numbers?


class Drawn(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What one row's samples gave, up to the first that failed. `failure`: why not even the first gave a token, or
    that the tail which it wrote is none.

    `hidden_D`: float32, of a row that pools.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()  # one for each token, or none at all
    failure: str | None = None
    hidden_D: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class StepResult:
    """`drawn[i]`: of batch row i. `prompt_logprobs[i]`: of row i's prompt tokens, in parts."""

    drawn: Sequence[Drawn]
    prompt_logprobs: dict[int, list[TokenLogprobs]]


_NOTHING = Drawn()


class ModelRunner:
    """`max_seqs`: tokens that a step draws at most for steps behind it."""

    def __init__(
        self,
        model: CausalModel,
        pool: KVPool,
        backend: AttentionBackend,
        sampler: Sampler,
        device: torch.device,
        max_seqs: int = 1024,
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self._sampler = sampler
        self._device = device
        self.inputs: Inputs = HostInputs() if device.type == "cpu" else PinnedInputs(device)
        self.drawn_R = torch.zeros(max_seqs, dtype=torch.int64, device=device)
        self.graphs: DecodeGraphs | None = None
        self._beside = _stream_beside(device)
        self._head: RecordedHead | None = None
        self.rows_outlive = False
        """Are a step's hidden rows read when the next step may have run?"""
        self.on_progress: Callable[[], None] = lambda: None
        """Called at each layer of a step: a long step is not a hung one."""

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, after what was run before and before what is run next."""
        self._pool.copy_blocks(copies)

    def observe(self, wrap: Callable[[AttentionBackend, KVPool], AttentionBackend]) -> None:
        """Attention goes through what `wrap` makes of the backend, from the next step on."""
        self._backend = wrap(self._backend, self._pool)
        self.graphs = None  # recorded steps go through the backend that recorded them

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Pending:
        """Compute new KV and the logits of the rows that are sampled."""
        hidden_TD = self._run_model(batch) if len(batch.input_ids_T) else None
        tails = self._write_tails(batch, hidden_TD)
        rows = [sample for r in batch.rows for sample in r.samples]
        logits = self._model.logits(self._gather(batch, hidden_TD, len(rows))) if rows else None
        pending = Pending(batch, hidden_TD, logits, rows, self._prompt_logprobs(batch, hidden_TD))
        pending.tails = tails
        pending.pooled = self._pool_rows(batch, hidden_TD)
        assert not rows or pending.pooled is None, "an engine draws tokens or makes vectors"
        if not rows:
            pending.ran = Fetched.start([self.drawn_R[:1]])
        return pending

    @torch.inference_mode()
    def sample(self, pending: Pending, masks: RowMasks | None = None) -> None:
        """Draw the next token of each sampled row. `masks`: what grammars allow in some of them."""
        if pending.logits_RV is not None:
            pending.result = self._sampler.sample(pending.logits_RV, pending.sample_rows, masks)
            count = min(len(pending.sample_rows), len(self.drawn_R))
            self.drawn_R[:count].copy_(pending.result.token_ids_R[:count])
            pending.logits_RV = None  # memory for the next step's

    def record_head(self) -> None:
        """Make `draw_beside` quicker to launch, for the usual draw of one row."""
        assert self._beside is not None
        self._head = RecordedHead(self._model, self._pool, self.inputs, self._sampler.vocab_size, self._beside)
        self._head.record()

    def forget_steps(self) -> None:
        """Compute without what is recorded from now on."""
        self.graphs = self._head = None

    @torch.inference_mode()
    def draw_beside(self, batch: Batch, masks: RowMasks | None = None) -> Pending:
        """Head and draw for rows that were handed over, beside the steps; no step finds these tokens on the device."""
        rows = [sample for r in batch.rows for sample in r.samples]
        with torch.cuda.stream(self._beside) if self._beside is not None else contextlib.nullcontext():
            result = self._head.draw(batch) if self._head is not None and masks is None else None
            if result is None:
                logits = self._model.logits(self._gather(batch, None, len(rows)))
                result = self._sampler.sample(logits, rows, masks)
            return Pending(batch, None, None, rows, {}, result)

    def is_done(self, pending: Pending) -> bool:
        """Does `collect` not wait?"""
        awaited = pending.ran if pending.result is None else pending.result.fetched
        return awaited is None or awaited.ready

    def collect(self, pending: Pending) -> StepResult:
        """Wait for the step and bring its results to the host."""
        rows, result = pending.batch.rows, pending.result
        if result is None:
            if pending.ran is not None:
                pending.ran.get()  # blocks that are given back now may be written by others than this stream
            return StepResult(_with_tails(pending, _pooled(pending)), _of_prompts(pending))
        tokens, failures, logprobs = result.tokens, result.failures, result.logprobs if result.raw is not None else ()
        drawn, first = [], 0
        for row in rows:
            end = first + len(row.samples)
            if not failures and not logprobs:
                drawn.append(Drawn(tokens[first:end]))
            else:
                good = next((j for j in range(first, end) if j in failures), end)
                found = [entry for entry in logprobs[first:good] if entry is not None]
                drawn.append(Drawn(tokens[first:good], found, failures.get(first) if good == first else None))
            first = end
        return StepResult(_with_tails(pending, drawn), _of_prompts(pending))

    def drop(self, pending: Pending) -> None:
        """Instead of `collect`, of the step that was launched last: wait until the device has done it."""
        self.wait()

    def wait(self) -> None:
        """Until the device has done all steps, copies and passes that it was given; not what hand-offs gave it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _run_model(self, batch: Batch) -> Tensor:
        size = self.graphs.size_for(batch) if self.graphs is not None else 0
        if size:
            assert self.graphs is not None
            hidden_TD = self.graphs.replay(batch, size)
            return hidden_TD.clone() if self.rows_outlive else hidden_TD
        tensors = self.inputs.put(arrays_of(batch))
        ctx = context_of(batch, tensors, self._pool, self._backend, self.on_progress)
        self._backend.plan(ctx)
        input_ids = tensors["input_ids"]
        if "pending" in tensors:
            input_ids = known_or_drawn(input_ids, tensors["pending"], self.drawn_R)
        media = self._media(batch.media) if batch.media is not None else None
        return self._model.forward(input_ids, tensors["positions"], ctx, media)

    def _media(self, media: BatchMedia) -> StepMedia:
        device, turned = self._device, media.rope_positions_3T
        parts = [sent(part.rows_NW, device) for part in media.parts]
        return StepMedia(
            sent(torch.from_numpy(media.rows_N), device),
            torch.cat(parts) if parts else torch.empty(0, 0, device=device),
            sent(torch.from_numpy(turned), device) if turned is not None else None,
        )

    def _gather(self, batch: Batch, hidden_TD: Tensor | None, num_samples: int) -> Tensor:
        """Hidden rows of all samples, from this step's forward or, one a sequence, from the tail pool."""
        if hidden_TD is not None and all(len(r.samples) == len(r.token_ids) for r in batch.rows):
            return hidden_TD
        sampled = [(r, last) for r, last in zip(batch.rows, batch.last_rows, strict=True) if r.samples]
        tails = [r.tail_read for r, _ in sampled if r.tail_read >= 0]
        computed = [i for r, last in sampled if r.tail_read < 0 for i in range(last + 1 - len(r.samples), last + 1)]
        if not tails:
            assert hidden_TD is not None
            return hidden_TD.index_select(0, self._index(computed))
        tail_RD = self._pool.read_tail(self._index(tails))
        if len(tails) == num_samples:
            return tail_RD
        out = tail_RD.new_empty(num_samples, tail_RD.shape[1])
        is_tail = [r.tail_read >= 0 for r, _ in sampled for _ in r.samples]
        out.index_copy_(0, self._index([i for i, tail in enumerate(is_tail) if tail]), tail_RD)
        if computed:
            assert hidden_TD is not None
            rows = hidden_TD.index_select(0, self._index(computed))
            out.index_copy_(0, self._index([i for i, tail in enumerate(is_tail) if not tail]), rows)
        return out

    def _write_tails(self, batch: Batch, hidden_TD: Tensor | None) -> Fetched | None:
        writers = [i for i, r in enumerate(batch.rows) if r.tail_write >= 0]
        if not writers:
            return None
        assert hidden_TD is not None
        rows_RD = hidden_TD.index_select(0, self._index([batch.last_rows[i] for i in writers]))
        self._pool.write_tail(self._index([batch.rows[i].tail_write for i in writers]), rows_RD)
        return Fetched.start([rows_RD.isfinite().all(1)])

    def _pool_rows(self, batch: Batch, hidden_TD: Tensor | None) -> Fetched | None:
        last = [last for r, last in zip(batch.rows, batch.last_rows, strict=True) if r.pools]
        if not last:
            return None
        assert hidden_TD is not None
        return Fetched.start([self._model.norm(hidden_TD.index_select(0, self._index(last))).float()])

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return self.inputs.put({"index": np.array(numbers, np.int64)})["index"]

    def _prompt_logprobs(self, batch: Batch, hidden_TD: Tensor | None) -> dict[int, list[PromptLogprobs]]:
        out: dict[int, list[PromptLogprobs]] = {}
        for i, row in enumerate(batch.rows):
            if row.prompt_logprobs < 0 or not row.prompt_targets:
                continue
            assert hidden_TD is not None
            first = batch.last_rows[i] + 1 - len(row.token_ids)
            out[i] = []
            for targets_T in torch.split(self._index(row.prompt_targets), PROMPT_LOGPROB_ROWS):
                self.on_progress()
                logits = self._model.logits(hidden_TD[first : first + len(targets_T)])
                out[i].append(prompt_logprobs(logits, targets_T, row.prompt_logprobs))
                first += len(targets_T)
        return out


def _of_prompts(pending: Pending) -> dict[int, list[TokenLogprobs]]:
    return {i: [part.get() for part in parts] for i, parts in pending.prompt_logprobs.items()}


def _with_tails(pending: Pending, drawn: Sequence[Drawn]) -> Sequence[Drawn]:
    """With a failure for each row whose tail is not of numbers."""
    if pending.tails is None:
        return drawn
    are_numbers = iter(pending.tails.get()[0].tolist())
    return [
        Drawn(failure=NOT_FINITE) if row.tail_write >= 0 and not next(are_numbers) else one
        for row, one in zip(pending.batch.rows, drawn, strict=True)
    ]


def _pooled(pending: Pending) -> Sequence[Drawn]:
    """Of a step that drew nothing."""
    rows = pending.batch.rows
    if pending.pooled is None:
        return [_NOTHING] * len(rows)
    hidden_R = iter(pending.pooled.get()[0].numpy())
    return [Drawn(hidden_D=next(hidden_R)) if row.pools else _NOTHING for row in rows]


def _stream_beside(device: torch.device) -> torch.cuda.Stream | None:
    """A GPU's stream for what must not wait for the steps."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    if not gpu.unavailable():
        gpu.linear.keep_apart(stream)
    return stream
