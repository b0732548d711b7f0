"""The router's end of one decode worker: one stream for all requests, taken up again when it breaks.

    CONNECTING -> ATTACHED <-> BROKEN (tries again with growing pauses) -> over

While BROKEN, its requests wait: reattaching brings them back with nothing lost. They are moved to other workers
at once when the worker was restarted, after one failed attempt when it is no longer a member, and otherwise after
a few; after `HASTE_S` in any case, if they can go on elsewhere: a worker may take a connection and say nothing.
Rows for a slot whose Submit has not been answered yet are kept until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Final

from common.errors import DeadlineExceededError, InternalError, NanoDeployError, UnavailableError
from common.rpc.client import Backoff
from common.rpc.codec import StepRows
from common.telemetry import get_logger
from common.types import ChoiceDelta, Clock, RequestStats, TokenLogprobs, WorkerRef
from services.router.contract import DecodePeer, DecodeStream
from services.router.generation import ABNORMAL, Generation
from services.router.outbox import Outbox
from services.router.reaching import Reaching
from services.router.stash import ClosedSlots, Row, Stash

PATIENT_ATTEMPTS: Final = 3  # failed reattachments before requests are moved, if another worker could take them
HASTE_S: Final = 1.0  # for them in all, and for each: a worker that is well answers in milliseconds
PATIENCE_S: Final = 5.0  # if none could
STEADY_S: Final = 1.0  # a stream that held this long, or brought something, was no failure
_MAX_GAPS: Final = 3
_QUIET_ATTEMPTS: Final = 60  # an unreachable worker is mentioned about once a minute
_CLOSE_S: Final = 0.5

_log = get_logger(__name__)


class WorkerLink:
    """`on_lost(generation, why, forgotten)` is called for each request that must be placed again."""

    def __init__(
        self,
        ref: WorkerRef,
        peer: DecodePeer,
        *,
        clock: Clock,
        rng: random.Random,
        connect_timeout_s: float,
        on_lost: Callable[[Generation, NanoDeployError, bool], None],
        others_ready: Callable[[WorkerRef], bool],
        on_attached: Callable[[], None],
    ) -> None:
        self.ref = ref
        self.attached = False  # there is a working stream
        self.restarted = False  # another process answers at its address: this one will not come back
        self.over = False  # it ended by itself: restarted, or no longer a member and without requests
        self._peer = peer
        self._clock = clock
        self._backoff = Backoff(rng)
        self._connect_timeout_s = connect_timeout_s
        self._on_lost = on_lost
        self._others_ready = others_ready
        self._on_attached = on_attached
        self._outbox = Outbox()
        self._open: dict[int, Generation] = {}
        self._submitting = 0
        self._reaching = Reaching()
        self._stash = Stash()
        self._closed = ClosedSlots()
        self._stream: DecodeStream | None = None
        self._broken = False
        self._attaching: asyncio.Timeout | None = None
        self._leaving = False  # the stream was closed here
        self._steady = False  # the stream brought something
        self._retired = False  # no longer a member
        self._closing = False
        self._failures = 0  # streams in a row that did not hold
        self._broken_at = 0.0
        self._task = asyncio.create_task(self._run(), name=f"link-{ref.worker_id}")

    # -- requests --

    @property
    def load(self) -> int:
        """Requests this router has on the worker."""
        return len(self._open) + self._submitting

    def begin(
        self, generation: Generation, prefill: WorkerRef | None, then: Callable[[NanoDeployError | None], None]
    ) -> None:
        """Ask the worker; its answer binds the generation to a slot. `then` gets None when it has, else why not.

        Raises `InvalidRequestError` for what cannot be sent at all.
        """
        request = generation.to_resume()

        def answered(answer: int | NanoDeployError) -> None:
            error = self._answered(generation, answer, request.ended_choices)
            self._submitted()
            then(error)

        self._submitting += 1
        try:
            self._peer.submit(request, prefill, self._connect_timeout_s, answered)
        except BaseException:
            self._submitted()
            raise

    async def submit(self, generation: Generation, prefill: WorkerRef | None) -> None:
        """`begin`, once there is a stream. Raises what the worker said, `UnavailableError` if it is out of reach."""
        bound: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then(error: NanoDeployError | None) -> None:
            if bound.done():
                return  # nobody waits any longer
            if error is None:
                bound.set_result(None)
            else:
                bound.set_exception(error)

        self._submitting += 1
        try:
            if not self.attached and not self.over:
                await self._reach()
            if self.over:
                raise self._gone()
            if generation.done:
                return
            self.begin(generation, prefill, then)
        finally:
            self._submitted()
        await bound

    async def _reach(self) -> None:
        try:
            await self._reaching.wait(self._connect_timeout_s)
        except TimeoutError:
            raise UnavailableError(f"worker {self.ref.worker_id} cannot be reached") from None

    def _answered(
        self, generation: Generation, answer: int | NanoDeployError, ended_choices: Sequence[int]
    ) -> NanoDeployError | None:
        if isinstance(answer, int):
            if self.over:
                return self._gone()  # another process answered, and drops what nobody attaches to
            self._bind(generation, answer, ended_choices)
            return None
        if isinstance(answer, DeadlineExceededError):
            return UnavailableError(f"worker {self.ref.worker_id} did not answer: {answer.message}")
        return answer

    def _submitted(self) -> None:
        self._submitting -= 1
        if not self._submitting:
            for slot, row in self._stash.clear():
                self._stray(slot, row)

    def _gone(self) -> UnavailableError:
        return UnavailableError(f"worker {self.ref.worker_id} is gone")

    def drop(self, generation: Generation) -> None:
        """The router wants no more of it."""
        if generation.slot in self._open:
            self._forget(generation)
            self._outbox.cancel(generation.slot)

    def drop_choice(self, generation: Generation, choice: int) -> None:
        """The router wants no more of one choice; others go on."""
        self._outbox.cancel(generation.slot, choice)

    def _bind(self, generation: Generation, slot: int, ended_choices: Sequence[int]) -> None:
        """`ended_choices` is what the worker was told: others may have ended since."""
        generation.link, generation.slot, generation.worker_id = self, slot, self.ref.worker_id
        self._open[slot] = generation
        if generation.done:
            self.drop(generation)
            return
        for choice, over in enumerate(generation.ended):
            if over and choice not in ended_choices:
                self.drop_choice(generation, choice)
        if slot in self._stash:
            for row in self._stash.take(slot):
                self._apply(slot, row)

    def _forget(self, generation: Generation) -> None:
        self._open.pop(generation.slot, None)
        self._closed.add(generation.slot)
        self._outbox.forget(generation)
        generation.link = None

    def _lose(self, generation: Generation, error: NanoDeployError, *, forgotten: bool = False) -> None:
        self._forget(generation)
        generation.lost_on = self.ref
        self._on_lost(generation, error, forgotten)

    def _lose_all(self, error: NanoDeployError) -> None:
        """Move all requests; should the worker come back, it hears that they are not wanted."""
        if self.over or self.restarted or self._retired or self._others_ready(self.ref):
            self._reaching.tell(error)
        for generation in list(self._open.values()):
            self._outbox.cancel(generation.slot)
            self._lose(generation, error)

    # -- rows --

    def _dispatch(self, step: StepRows) -> None:
        """Stats and prompt logprobs first: whoever gets a row may read them."""
        for slot, stats in step.stats:
            self._apply(slot, stats)
        for slot, prompt in step.prompt_logprobs:
            self._apply(slot, prompt)
        rows, opened = step.rows, self._open
        columns = zip(rows.slots, rows.choices, rows.positions, rows.singles, strict=True)
        for row, (slot, choice, position, token_id) in enumerate(columns):
            generation = opened.get(slot)
            if generation is None:
                self._stray(slot, rows.delta(row))
            elif token_id < 0 or not generation.accept_single(choice, position, token_id):
                self._take(generation, rows.delta(row))
        for slot, failure in step.failures:
            self._apply(slot, failure)

    def _apply(self, slot: int, row: Row) -> None:
        generation = self._open.get(slot)
        if generation is None:
            self._stray(slot, row)
        elif isinstance(row, ChoiceDelta):
            self._take(generation, row)
        elif isinstance(row, RequestStats):
            generation.stats = row
        elif isinstance(row, TokenLogprobs):
            generation.prompt_logprobs = row
        else:
            error = row.to_error()
            generation.deaths += isinstance(error, UnavailableError)
            self._lose(generation, error)

    def _take(self, generation: Generation, delta: ChoiceDelta) -> None:
        if delta.finish is not None and delta.finish in ABNORMAL and not generation.has_ended(delta.choice):
            self._lose(generation, UnavailableError(f"worker {self.ref.worker_id} gave the request up"))
        elif not generation.accept(delta):
            self._missed(generation)
        else:
            self._outbox.received(generation)
            if generation.done:
                self._forget(generation)

    def _missed(self, generation: Generation) -> None:
        """Tokens before a row never came: the worker's log has them, unless it lost count."""
        if self._stream is None or self._leaving:
            return
        generation.gaps += 1
        if generation.gaps > _MAX_GAPS:
            self._outbox.cancel(generation.slot)
            self._lose(generation, InternalError(f"worker {self.ref.worker_id} skipped output tokens"))
        else:
            self._leave()

    def _stray(self, slot: int, row: Row) -> None:
        """A slot that is not open: not answered yet, or just closed, or left over from a lost answer.

        What no answer named while its Submit can have waited is nobody's, whatever else is being submitted.
        """
        if slot in self._closed:
            return
        now = self._clock.now()
        if self._submitting and now - self._stash.since(slot, now) <= 2 * self._connect_timeout_s:
            self._stash.keep(slot, row, now)
        else:
            self._stash.take(slot)
            self._closed.add(slot)
            self._outbox.cancel(slot)

    # -- the stream --

    async def _run(self) -> None:
        while not self._closing and not self.restarted and (not self._retired or self.load):
            stream = self._stream = self._peer.open_stream()
            self._leaving = self._steady = False
            started_s = self._clock.now()
            try:
                await self._attach(stream)
                await self._pump(stream)
            except NanoDeployError as error:
                self._broke(error, started_s)
            except Exception as error:  # noqa: BLE001 - the edge of a loop
                _log.exception("stream failed", worker_id=self.ref.worker_id)
                self._broke(InternalError(f"the router failed on the stream: {type(error).__name__}"), started_s)
            finally:
                self.attached = False
                self._stream = None
                stream.close()
            if self._failures > 1 and not self._closing:  # the first attempt after a break is made at once
                await asyncio.sleep(self._backoff.next_s())
        self.over = True
        self._lose_all(UnavailableError(f"worker {self.ref.worker_id} left the cluster"))

    async def _attach(self, stream: DecodeStream) -> None:
        positions = [position for generation in self._open.values() for position in generation.open_positions()]
        try:
            async with asyncio.timeout(self._connect_timeout_s) as self._attaching:
                self.hurry()
                epoch, unknown = await stream.attach(self.ref.epoch, positions)
        except TimeoutError:
            raise UnavailableError(f"worker {self.ref.worker_id} did not answer the stream") from None
        finally:
            self._attaching = None
        if epoch != self.ref.epoch:
            self.restarted = True
            raise UnavailableError(f"worker {self.ref.worker_id} was restarted")
        for slot in unknown:
            if (generation := self._open.get(slot)) is not None:
                error = UnavailableError(f"worker {self.ref.worker_id} lost the request")
                self._lose(generation, error, forgotten=True)
        self._broken, self.attached = False, True
        self._reaching.tell()
        self._on_attached()
        self._outbox.signal()
        _log.info("stream attached", worker_id=self.ref.worker_id, resumed=len(positions), unknown=len(unknown))

    def hurry(self) -> None:
        """Without a stream, and others may have one now: what can go on there is not kept waiting."""
        if self.attached or not self._others_ready(self.ref):
            return
        self._reaching.tell(UnavailableError(f"worker {self.ref.worker_id} cannot be reached"))
        if self._broken and self._attaching is not None:
            when, soon = self._attaching.when(), asyncio.get_running_loop().time() + HASTE_S
            self._attaching.reschedule(soon if when is None else min(when, soon))

    async def _pump(self, stream: DecodeStream) -> None:
        """Read until the stream breaks; the writer ends with it."""
        writer = asyncio.create_task(self._outbox.write_to(stream))
        try:
            while True:
                self._dispatch(await stream.read())
                self._steady = True
        finally:
            stream.close()
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError, NanoDeployError):
                await writer

    def _broke(self, error: NanoDeployError, started_s: float) -> None:
        """Count the failure; move the requests once patience is over."""
        now = self._clock.now()
        if self._steady or (self.attached and now - started_s >= STEADY_S):
            self._failures = 0
            self._backoff.reset()
        self._failures += 1
        if self._failures == 1:
            self._broken_at = now
        self._broken = True
        others = self._others_ready(self.ref)
        patience = 2 if self._retired else PATIENT_ATTEMPTS if others else 2**31
        patience_s = HASTE_S if others else PATIENCE_S
        moved = self.restarted or self._failures >= patience or now - self._broken_at >= patience_s
        if self._failures <= PATIENT_ATTEMPTS or self._open or not self._failures % _QUIET_ATTEMPTS:
            _log.warning(
                "stream broke",
                worker_id=self.ref.worker_id,
                error=error.message,
                attempt=self._failures,
                requests=len(self._open),
                moved=moved,
            )
        if moved:
            self._lose_all(UnavailableError(f"worker {self.ref.worker_id} was lost: {error.message}"))

    def _leave(self) -> None:
        """End this stream: the next one begins where each request stands."""
        self._leaving = True
        if self._stream is not None:
            self._stream.close()

    # -- end --

    def retire(self) -> None:
        """The worker is no longer a member: use what it still sends, and reattach now to see if it is there."""
        if not self._retired:
            self._retired = True
            self._leave()

    def keep(self) -> None:
        """The worker is a member, or one again: its lease had run out."""
        self._retired = False

    async def close(self) -> None:
        """Tell the worker what nobody wants any more, if it listens, and end the stream."""
        if self.attached:
            await self._outbox.drained(_CLOSE_S)
        self._closing = True
        self._leave()
        await asyncio.wait({self._task}, timeout=_CLOSE_S)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._outbox.close()
        await self._peer.close()
