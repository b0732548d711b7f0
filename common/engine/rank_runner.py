"""One model on several ranks: rank 0 tells the others what it runs, and they run the same.

    rank 0   forward(batch)   sample   collect   drop   copy_blocks   wait      each told before it is done here
    others   the same calls of the same runner, in the same order

Every rank draws every token itself, from logits that are equal to the bit and noise keyed by place, so the next step
finds its tokens on each device. Whatever goes wrong in a step on one rank leaves the others in another state: all are
lost then, and the engine ends.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from common.attention.context import AttentionBackend
from common.engine.batch import Batch, RowMasks
from common.engine.rank_wire import BatchDecoder, BatchEncoder
from common.engine.runner import ModelRunner, Pending, StepResult
from common.errors import ConfigError, RankLostError
from common.kvcache.pool import KVPool
from common.kvcache.tables import BlockCopy
from common.kvtransfer.publish import BlockPart, DigestLauncher, DigestsUnderWay
from common.kvtransfer.transport import DigestCheck
from common.parallel.link import Link, LinkClosedError
from common.parallel.ranks import ANSWER, DONE, Ranks

FORWARD, SAMPLE, COLLECT, COPY, DIGEST, TAKE, KEEP, DRAFT, WAIT, DROP = range(16, 26)
_ANSWER_S = 30.0  # a rank digests behind the step that it is in
_MAX_DIGESTS = 4096  # batches that nobody asked for, of orders that ended early
_IDLE_S = 5.0


class Runner(Protocol):
    """What an engine calls: see `common.engine.runner.ModelRunner`."""

    on_progress: Callable[[], None]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def forward(self, batch: Batch) -> Pending: ...

    def sample(self, pending: Pending, masks: RowMasks | None = None) -> None: ...

    def is_done(self, pending: Pending) -> bool: ...

    def collect(self, pending: Pending) -> StepResult: ...

    def drop(self, pending: Pending) -> None: ...

    def wait(self) -> None: ...

    def observe(self, wrap: Callable[[AttentionBackend, KVPool], AttentionBackend]) -> None: ...


class RankedRunner:
    """The runner of rank 0, and with it those of all ranks."""

    def __init__(self, inner: ModelRunner, ranks: Ranks) -> None:
        self._inner = inner
        self._ranks = ranks
        self._encoder = BatchEncoder()
        self._on_progress: Callable[[], None] = lambda: None
        inner.on_progress = self._progressed

    @property
    def on_progress(self) -> Callable[[], None]:
        return self._on_progress

    @on_progress.setter
    def on_progress(self, call: Callable[[], None]) -> None:
        self._on_progress = call

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        if copies:
            self._ranks.tell(COPY, pickle.dumps([tuple(c) for c in copies]))
        with together(self._ranks):
            self._inner.copy_blocks(copies)

    def forward(self, batch: Batch) -> Pending:
        self._ranks.tell(FORWARD, self._encoder.encode(batch), is_step=True)
        with together(self._ranks):
            return self._inner.forward(batch)

    def sample(self, pending: Pending, masks: RowMasks | None = None) -> None:
        self._ranks.tell(SAMPLE, b"" if masks is None else pickle.dumps(tuple(masks), protocol=5))
        with together(self._ranks):
            self._inner.sample(pending, masks)

    def is_done(self, pending: Pending) -> bool:
        return self._inner.is_done(pending)

    def collect(self, pending: Pending) -> StepResult:
        self._ranks.tell(COLLECT)
        with together(self._ranks):
            return self._inner.collect(pending)

    def drop(self, pending: Pending) -> None:
        self._ranks.tell(DROP)
        with together(self._ranks):
            self._inner.drop(pending)

    def wait(self) -> None:
        self._ranks.tell(WAIT)
        with together(self._ranks):
            self._inner.wait()

    def observe(self, wrap: Callable[[AttentionBackend, KVPool], AttentionBackend]) -> None:
        raise ConfigError("scales are calibrated on one rank: say tensor_parallel_size 1", param="tensor_parallel_size")

    def _progressed(self) -> None:
        self._ranks.progressed()
        self._on_progress()


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """What fails in it, or does not come to its end, fails on all ranks; what is computed without one of them counts
    for nothing. `RankLostError` names the rank.
    """
    try:
        yield
    except RankLostError:
        raise
    except Exception as error:
        ranks.give_up(f"a step failed on rank 0 of several: {type(error).__name__}: {error}")
        try:
            ranks.check()
        except RankLostError as lost:
            raise lost from error
        raise
    except BaseException as error:
        ranks.give_up(f"rank 0 was interrupted inside a step: {type(error).__name__}", 0.0)
        raise
    ranks.check()


class RankedDigests:
    """Digests of what is published, on the ranks beside rank 0."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._numbers = itertools.count()

    def launch(self, parts: Sequence[BlockPart]) -> DigestsOfRanks:
        number = next(self._numbers)
        self._ranks.tell(DIGEST, pickle.dumps((number, [tuple(part) for part in parts])))
        return DigestsOfRanks(self._ranks, number)


class DigestsOfRanks:
    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks = ranks
        self._number = number
        self._found: list[int] | None = None

    def values(self) -> list[int]:
        """Waits for all ranks. For each part the digests of one rank after the other."""
        if self._found is None:
            self._ranks.tell(TAKE, pickle.dumps(self._number))
            by_rank = [pickle.loads(answer) for answer in self._ranks.answers(_ANSWER_S)]
            self._found = [d for of_part in zip(*by_rank, strict=True) for of_rank in of_part for d in of_rank]
        return self._found


class Drafts(Protocol):
    """What another rank does of drafting: `common.engine.rank_drafts.DraftFollower`."""

    def keep(self, hidden: Tensor | None, payload: bytes) -> None: ...

    def run(self, hidden: Tensor | None, payload: bytes) -> None: ...


class RankLoop:
    """The life of another rank: does what rank 0 tells it until the link ends.

    `checks`: what is digested of a part of a block here; `launcher` digests it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        link: Link,
        checks: Callable[[BlockPart], list[DigestCheck]],
        launcher: DigestLauncher,
        drafts: Drafts | None,
    ) -> None:
        self._drafts = drafts
        self._hidden: Tensor | None = None
        self._runner = runner
        self._link = link
        self._checks = checks
        self._launcher = launcher
        self._digests: dict[int, tuple[DigestsUnderWay, list[int]]] = {}
        self._num_done = 0
        self._done = threading.Condition()
        self._decoder = BatchDecoder()
        self._pending: deque[Pending] = deque()

    def serve(self) -> None:
        """Until rank 0 ends the link. What a step raises is raised."""
        while True:
            try:
                if not self._link.wait(_IDLE_S):
                    continue
                kind, payload = self._link.receive()
            except LinkClosedError:
                return
            self._do(kind, payload)
            with self._done:
                self._num_done += 1
                self._done.notify_all()

    def await_orders(self, count: int, timeout_s: float) -> bool:
        """From another thread: until so many orders are done; False if that takes longer."""
        with self._done:
            return self._done.wait_for(lambda: self._num_done >= count, timeout_s)

    def _do(self, kind: int, payload: bytes) -> None:
        if kind == FORWARD:
            self._pending.append(self._runner.forward(self._decoder.decode(payload)))
        elif kind == SAMPLE:
            masks = RowMasks(*pickle.loads(payload)) if payload else None
            self._runner.sample(self._pending[-1], masks)
        elif kind == COLLECT:
            pending = self._pending.popleft()
            self._runner.collect(pending)
            self._hidden = pending.hidden_TD
            self._link.send(DONE)
        elif kind == DROP:
            self._runner.drop(self._pending.pop())
            self._link.send(DONE)
        elif kind == COPY:
            self._runner.copy_blocks([BlockCopy(*c) for c in pickle.loads(payload)])
        elif kind == WAIT:
            self._runner.wait()
        elif kind == DIGEST:
            self._digest(*pickle.loads(payload))
        elif kind == TAKE:
            self._answer(pickle.loads(payload))
        else:
            assert self._drafts is not None, f"order {kind} is not known"
            (self._drafts.keep if kind == KEEP else self._drafts.run)(self._hidden, payload)

    def _digest(self, number: int, parts: Sequence[tuple[str, int, int, int, int]]) -> None:
        checks = [self._checks(BlockPart(*part)) for part in parts]
        batch = self._launcher.launch([check for of_part in checks for check in of_part])
        self._digests[number] = batch, [len(of_part) for of_part in checks]
        if len(self._digests) > _MAX_DIGESTS:
            del self._digests[next(iter(self._digests))]

    def _answer(self, number: int) -> None:
        batch, counts = self._digests.pop(number)
        values = iter(batch.values())
        self._link.send(ANSWER, pickle.dumps([list(itertools.islice(values, count)) for count in counts]))
