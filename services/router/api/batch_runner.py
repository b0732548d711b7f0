"""Runs batches in the background of every router: each batch by one of them at a time, each line once.

    look (woken, or every few seconds) -> claim a batch's work -> validate -> run what has no result -> finalize

A line's result is stored before it counts, as a part that is written once and taken from the claim's holder alone. A
router that dies leaves its claims to run out; the next one goes on with the lines that have no result. What ended a
batch - all lines, a cancel, its window - is decided here; finalizing can be begun again at any point.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

from common.errors import InvalidRequestError, NanoDeployError, NotFoundError
from common.rpc.codec.objects import ObjectKey
from common.rpc.objects import ObjectClient
from common.telemetry import get_logger, new_trace
from services.router.admission.callers import Caller, Callers
from services.router.api.batch_lines import Fault, Line, is_good, lost_row, parse, request_body, result_row
from services.router.api.batches import ENDED, KIND, WORK, change_document, work_key
from services.router.api.files import KIND as FILE
from services.router.api.files import Files
from services.router.api.local import LocalExchange
from services.router.api.stored import content_of, load
from services.router.replies import dumps

LOOK_S: Final = 5.0
CLAIM_S: Final = 15.0
RENEW_S: Final = 3.0
MAX_BATCHES: Final = 2  # of one router at once: it has their input in memory
RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 20.0
_AGAIN: Final = (0, 429, 499, 503)  # a line that was refused for now waits
_ROWS: Final = 256

Handle = Callable[[LocalExchange], Awaitable[None]]

_log = get_logger(__name__)


class Work(NamedTuple):
    key: ObjectKey  # of the work: claim and results
    batch: ObjectKey
    caller: Caller  # who asked for it
    file_ttl_s: int


class _StoppedError(Exception):
    """The claim was lost, or the router stops: somebody else goes on."""


class BatchRunner:
    """start -> ... -> close. `handles`: endpoint -> what answers its requests."""

    def __init__(
        self,
        objects: ObjectClient,
        files: Files,
        handles: Mapping[str, Handle],
        callers: Callers,
        *,
        concurrency: int,
        rng: random.Random,
    ) -> None:
        self._objects = objects
        self._files = files
        self._handles = handles
        self._callers = callers
        self._rng = rng
        self._holder = f"router-{secrets.token_hex(8)}"
        self._slots = asyncio.Semaphore(concurrency)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.create_task(self._look_on(), name="batches")

    def wake(self) -> None:
        self._woken.set()

    async def close(self) -> None:
        tasks = [*self._running.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- looking --

    async def _look_on(self) -> None:
        while True:
            try:
                await self._look()
            except NanoDeployError as error:
                _log.debug("batches not looked for", error=error.message)
            except Exception:  # noqa: BLE001 - the edge of a loop
                _log.exception("looking for batches failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S * self._rng.uniform(0.8, 1.2)):
                    await self._woken.wait()
            self._woken.clear()

    async def _look(self) -> None:
        """Claim the oldest work that nobody has."""
        waiting, after, more = [], "", True
        while more:
            page = await self._objects.page(WORK, "", after=after, limit=100)
            waiting += [stored for stored in page.objects if not stored.holder]
            more = page.has_more and bool(page.objects)
            after = page.objects[-1].id if page.objects else ""
        for stored in reversed(waiting):
            if len(self._running) >= MAX_BATCHES:
                return
            key = work_key(stored.id)
            if stored.id in self._running or not await self._objects.claim(key, self._holder, CLAIM_S):
                continue
            about = content_of(stored)
            caller = self._callers.again(about["key_id"], about["tenant"])
            work = Work(key, ObjectKey(KIND, about["owner"], stored.id), caller, about["file_ttl_s"])
            task = self._running[stored.id] = asyncio.create_task(self._run(work), name=f"batch {stored.id}")
            task.add_done_callback(lambda _, id_=stored.id: self._running.pop(id_, None))  # type: ignore[misc]

    # -- one batch --

    async def _run(self, work: Work) -> None:
        stop = asyncio.Event()  # nothing new is begun
        progress = {"completed": 0, "failed": 0}
        batch_work = asyncio.create_task(self._work(work, stop, progress))
        try:
            while not (await asyncio.wait({batch_work}, timeout=RENEW_S))[0]:
                await self._renew(work, stop, progress)
            batch_work.result()
        except (_StoppedError, NotFoundError):
            _log.info("batch given up", id=work.batch.id)
        except NanoDeployError as error:
            _log.warning("batch interrupted", id=work.batch.id, error=error.message)
        except Exception:  # noqa: BLE001 - the edge of a task
            _log.exception("batch interrupted", id=work.batch.id)
        finally:
            batch_work.cancel()
            await asyncio.wait({batch_work})
            with contextlib.suppress(NanoDeployError, NotFoundError):
                await self._objects.claim(work.key, self._holder, 0)

    async def _renew(self, work: Work, stop: asyncio.Event, progress: dict[str, int]) -> None:
        """Keep the claim, show progress, hear of a cancel and of the window's end."""
        try:
            if not await self._objects.claim(work.key, self._holder, CLAIM_S):
                raise _StoppedError

            def change(batch: dict[str, Any]) -> None:
                if batch["status"] == "in_progress":
                    batch["request_counts"] |= progress

            batch = await change_document(self._objects, work.batch, change)
        except NotFoundError:
            raise
        except NanoDeployError as error:
            _log.warning("batch not renewed", id=work.batch.id, error=error.message)
            return
        if batch["status"] == "cancelling" or time.time() >= batch["expires_at"]:
            stop.set()

    async def _work(self, work: Work, stop: asyncio.Event, progress: dict[str, int]) -> None:
        batch = (await load(self._objects, work.batch)).content
        if batch["status"] in ENDED:
            await self._objects.delete(work.key)
            return
        lines = await self._validated(work, batch)
        if lines is None:
            return
        if batch["status"] == "cancelling" or time.time() >= batch["expires_at"]:
            stop.set()
        found = await self._results(work, progress)
        left = [line for line in lines if line.number not in found]
        fault = await self._run_lines(work, batch["endpoint"], left, stop, progress)
        await self._finalize(work, lines, fault)

    async def _validated(self, work: Work, batch: dict[str, Any]) -> list[Line] | None:
        """Its lines; None if they are wrong, and then it has failed."""
        try:
            file = await self._files.load(work.batch.owner, batch["input_file_id"])
            content = b"".join([part async for part in self._files.read(file.key)])
            lines, faults = await asyncio.to_thread(parse, content, batch["endpoint"])
        except (InvalidRequestError, NotFoundError):
            lines, faults = [], [Fault(None, "invalid_file", "The input file is not there any more.")]
        now = int(time.time())

        def change(current: dict[str, Any]) -> None:
            if faults:
                errors = {"object": "list", "data": [fault.as_dict() for fault in faults]}
                current |= {"status": "failed", "failed_at": now, "errors": errors}
            elif current["status"] == "validating":
                current |= {"status": "in_progress", "in_progress_at": now}
            current["request_counts"]["total"] = len(lines)

        batch.update(await change_document(self._objects, work.batch, change))
        if faults:
            await self._objects.delete(work.key)
            return None
        return lines

    async def _results(self, work: Work, progress: dict[str, int]) -> set[int]:
        """Lines that have a result, from whoever ran the batch before."""
        numbers = await self._objects.list_parts(work.key)
        for start in range(0, len(numbers), _ROWS):
            for row in (await self._objects.get_parts(work.key, numbers[start : start + _ROWS])).values():
                progress["completed" if is_good(row) else "failed"] += 1
        return set(numbers)

    # -- lines --

    async def _run_lines(
        self, work: Work, endpoint: str, lines: list[Line], stop: asyncio.Event, progress: dict[str, int]
    ) -> Fault | None:
        """Run them as slots come free, until `stop`. A fault ends the batch."""
        running: set[asyncio.Task[Any]] = set()
        stopped = asyncio.create_task(stop.wait())
        try:
            for line in lines:
                if not await self._free_slot(stopped):
                    break
                task = asyncio.create_task(self._line(work, endpoint, line, progress))
                task.add_done_callback(lambda _: self._slots.release())  # also where it ends before it began
                running.add(task)
                running = _without_ended(running)
            while running and not stop.is_set():
                await asyncio.wait({*running, stopped}, return_when=asyncio.FIRST_COMPLETED)
                running = _without_ended(running)
        except InvalidRequestError as error:
            return Fault(None, "results_too_large", error.message)
        finally:
            stopped.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return None

    async def _free_slot(self, stopped: asyncio.Task[Any]) -> bool:
        """Take a slot; False, and none taken, once the batch is stopped."""
        slot: asyncio.Task[Any] = asyncio.create_task(self._slots.acquire())
        try:
            await asyncio.wait({slot, stopped}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._give_up(slot)
            raise
        if stopped.done():
            self._give_up(slot)
            return False
        return True

    def _give_up(self, slot: asyncio.Task[Any]) -> None:
        if slot.done() and not slot.cancelled():
            self._slots.release()
        else:
            slot.cancel()

    async def _line(self, work: Work, endpoint: str, line: Line, progress: dict[str, int]) -> None:
        body, wait_s = request_body(line, endpoint), RETRY_S
        while True:
            local = LocalExchange(body, new_trace(self._rng).traceparent, work.caller)
            try:
                await self._handles[endpoint](local)
            finally:
                local.lose()
            if local.status not in _AGAIN or not local.may_help:
                break
            await asyncio.sleep(wait_s * self._rng.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, MAX_RETRY_S)
        row = result_row(work.batch.id, line, local.status, local.request_id, local.payload)
        await self._keep(work, line.number, row)
        progress["completed" if local.status == 200 else "failed"] += 1

    async def _keep(self, work: Work, number: int, row: bytes) -> None:
        """Store a result; while that cannot be, the line holds its slot."""
        while True:
            try:
                await self._objects.put_parts(work.key, {number: row}, holder=self._holder)
                return
            except (InvalidRequestError, NotFoundError):
                raise
            except NanoDeployError as error:
                _log.info("batch result not stored yet", id=work.batch.id, error=error.message)
                await asyncio.sleep(RETRY_S)

    # -- the end --

    async def _finalize(self, work: Work, lines: list[Line], fault: Fault | None) -> None:
        """Results become the output and the error file; the document says how it ended; the work goes."""

        def begin(batch: dict[str, Any]) -> None:
            if batch["status"] == "in_progress":
                batch |= {"status": "finalizing", "finalizing_at": int(time.time())}

        batch = await change_document(self._objects, work.batch, begin)
        numbers = await self._objects.list_parts(work.key)
        counts = {"total": len(lines), "completed": 0, "failed": 0}
        done = set(numbers)
        missing = [line for line in lines if line.number not in done]
        cancelled = batch["status"] == "cancelling"
        output = _Output(self._files, work, "output")
        errors = _Output(self._files, work, "error")
        for start in range(0, len(numbers), _ROWS):
            rows = await self._objects.get_parts(work.key, numbers[start : start + _ROWS])
            good = {number: row for number, row in rows.items() if is_good(row)}
            bad = {number: row for number, row in rows.items() if number not in good}
            counts["completed"] += len(good)
            counts["failed"] += len(bad)
            await output.add(good)
            await errors.add(bad)
        if missing and not cancelled and fault is None:
            why = "This request could not be executed before the completion window expired."
            lost = {line.number: lost_row(work.batch.id, line, "batch_expired", why) for line in missing}
            counts["failed"] += len(lost)
            await errors.add(lost)
        status = "cancelled" if cancelled else "failed" if fault else "expired" if missing else "completed"
        ids = {"output_file_id": await output.close(), "error_file_id": await errors.close()}

        def end(batch: dict[str, Any]) -> None:
            batch |= {"status": status, f"{status}_at": int(time.time()), "request_counts": counts, **ids}
            if fault is not None:
                batch["errors"] = {"object": "list", "data": [fault.as_dict()]}

        await change_document(self._objects, work.batch, end)
        await self._objects.delete(work.key)
        _log.info("batch ended", id=work.batch.id, status=status, **counts)


def _without_ended(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Raises what one of them raised."""
    for task in tasks:
        if task.done():
            task.result()
    return {task for task in tasks if not task.done()}


class _Output:
    """A file of results, made when the first row comes. Its id follows from the batch's: it can be begun again."""

    def __init__(self, files: Files, work: Work, what: str) -> None:
        self._files = files
        self._work = work
        self._what = what
        self._made: dict[str, Any] | None = None
        id_ = f"file-{work.batch.id.partition('_')[2]}-{what}"
        self._key = ObjectKey(FILE, work.batch.owner, id_)

    async def add(self, rows: Mapping[int, bytes]) -> None:
        if not rows:
            return
        if self._made is None:
            name, purpose = f"{self._work.batch.id}_{self._what}.jsonl", "batch_output"
            ttl_s = self._work.file_ttl_s
            self._made = await self._files.write(self._key.owner, self._key.id, name, purpose, ttl_s)
        await self._files.objects.put_parts(self._key, rows)
        self._made["bytes"] += sum(map(len, rows.values()))

    async def close(self) -> str | None:
        if self._made is None:
            return None
        await self._files.objects.put(self._key, dumps(self._made | {"status": "processed"}))
        return self._key.id
