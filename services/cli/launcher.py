"""Runs one cluster on this machine: starts, proves, watches and stops its services.

    starting --all ready, a token came through--> ready --signal--> stopping -> stopped
        `----a service died or time ran out------> failed (everything stopped, the log's tail shown)

While ready, a service that dies is reported with the tail of its log and started again, at most
`MAX_RESTARTS` times in `RESTART_WINDOW_S`. Services are stopped from the client's side inwards, so that answers
under way can end. Nothing survives the launcher: services die with it by the kernel's hand (`child`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import httpx
from rich.markup import escape

from common.engine.sizing import resolve_engine
from common.errors import NanoDeployError, UnavailableError
from services.cli.plan import ClusterPlan
from services.cli.probe import Answer, complete_once, wait_until_ready
from services.cli.process import ServiceProcess, ServiceSpec, last_words, tail
from services.cli.report import Report
from services.cli.state import ClusterState, Phase, ProcessId, StateFolder
from services.cli.token import auth_headers

MAX_RESTARTS = 5
RESTART_WINDOW_S = 300.0
PROOFS = 5
INTERRUPTED = 130
PROOF_TIMEOUT_S = 120.0
SPARE_S = 10.0  # for an orderly stop, beside what its groups of services may take
_STOP_ORDER = (("router",), ("prefill", "decode"), ("controller",), ("storage",))


@dataclass(frozen=True)
class LaunchOptions:
    version: str
    ready_timeout_s: float = 300.0
    grace_s: float = 30.0  # per group of services on the way down


def _client() -> httpx.AsyncClient:
    """For services of our own: the name in the API's certificate is not this machine's address."""
    return httpx.AsyncClient(verify=False)


class Launcher:
    """`run` does everything; `stop` may be called from a signal handler or another task."""

    def __init__(
        self,
        folder: StateFolder,
        plan: ClusterPlan,
        options: LaunchOptions,
        report: Report,
        check_path: Callable[[Answer], str],
        announce: Callable[[], Coroutine[None, None, None]],
        on_ready: Callable[[], Coroutine[None, None, None]],
    ) -> None:
        """`check_path` says which way the proving completion took or raises.

        `announce` has ended before the state says ready; `on_ready` then runs until it is cancelled.
        """
        self._folder = folder
        self._plan = plan
        self._options = options
        self._report = report
        self._check_path = check_path
        self._announce = announce
        self._on_ready = on_ready
        self._running: dict[str, ServiceProcess] = {}
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Ask for an orderly stop; asked again, everything is killed at once."""
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> int:
        """The exit code: 0 after an orderly stop, 1 when the cluster could not start or go on, 130 when it was
        stopped before it was ready.
        """
        loop = asyncio.get_running_loop()
        signals = {signal.SIGINT: self.stop, signal.SIGTERM: self.stop}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not under nohup
            signals[signal.SIGHUP] = self._stopping.set  # a shell and the kernel each send one: that is no hurry
        for number, handler in signals.items():
            loop.add_signal_handler(number, handler)
        failure, was_ready = "", False
        try:
            self._folder.prepare()
            for path, text in self._plan.files.items():
                path.touch(mode=0o600)  # it may hold the admin token
                path.chmod(0o600)
                path.write_text(text, encoding="utf-8")
            await self._until_stopped(self._start())
            if not self._stopping.is_set():
                await self._until_stopped(self._announce())
            if not self._stopping.is_set():
                was_ready = True
                self._save("ready")
                await self._until_stopped(self._serve())
        except NanoDeployError as error:
            failure = error.message
        except OSError as error:
            failure = f"{error.filename or self._folder.path}: {error.strerror}"
        finally:
            await self._stop_all(failure)
            if failure:  # last, where it is looked for
                self._report.note(f"[red]error[/red]: {escape(failure)}")
            for number in signals:
                loop.remove_signal_handler(number)
        if failure:
            return 1
        return 0 if was_ready else INTERRUPTED

    async def _until_stopped(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` to its end, or cancel it when a stop is asked for."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def _save(self, phase: Phase, detail: str = "") -> None:
        self._folder.write(
            ClusterState(
                name=self._folder.name,
                phase=phase,
                launcher=ProcessId.of(os.getpid()),
                url=self._plan.url,
                controller=self._plan.controller,
                model=self._plan.model,
                version=self._options.version,
                services=tuple(service.state for service in self._running.values()),
                detail=detail,
                stop_limit_s=self._options.grace_s * len(_STOP_ORDER) + SPARE_S,
            )
        )

    def _try_save(self, phase: Phase, detail: str = "") -> None:
        """A state that cannot be written, on a full disk, is no reason to end a cluster or to end it badly."""
        try:
            self._save(phase, detail)
        except OSError as error:
            self._report.note(f"the state in {escape(str(self._folder.path))} cannot be written: {error.strerror}")

    # -- start -------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """All services up and a token through them. Raises `UnavailableError`."""
        limit_s = self._options.ready_timeout_s
        try:
            with self._report:
                async with asyncio.timeout(limit_s), _client() as client:
                    storage = [spec for spec in self._plan.services if spec.role == "storage"]
                    await self._start_group(storage, client)
                    await self._start_group([s for s in self._plan.services if s.role != "storage"], client)
                    await self._prove(client)
        except TimeoutError:
            raise UnavailableError(
                f"not ready after {limit_s:.0f} s (--ready-timeout); logs are in {self._folder.logs_path}"
            ) from None

    async def _start_group(self, specs: list[ServiceSpec], client: httpx.AsyncClient) -> None:
        for spec in specs:
            self._report.start(spec.name)
            self._running[spec.name] = await ServiceProcess.spawn(spec)
        self._save("starting")
        try:
            async with asyncio.TaskGroup() as group:
                for spec in specs:
                    group.create_task(self._start_one(spec, client))
        except* UnavailableError as errors:
            raise errors.exceptions[0] from None

    async def _start_one(self, spec: ServiceSpec, client: httpx.AsyncClient) -> None:
        if not await self._ready_or_dead(spec, client):
            service = self._running[spec.name]
            self._report.fail(spec.name, service.describe_end())
            cause = last_words(spec.log)
            raise UnavailableError(f"{spec.name} cannot start: {cause}" if cause else _death_notice(service))
        self._report.done(spec.name)

    async def _ready_or_dead(self, spec: ServiceSpec, client: httpx.AsyncClient) -> bool:
        """Wait for the service to be ready (True) or to end (False)."""
        ready = asyncio.ensure_future(wait_until_ready(spec, client, lambda text: self._report.update(spec.name, text)))
        ended = asyncio.ensure_future(self._running[spec.name].wait())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await ready
            return not ended.done()
        finally:
            for task in (ready, ended):
                task.cancel()

    async def _prove(self, client: httpx.AsyncClient) -> None:
        """One real completion, long enough that prefill workers and the transfer take part."""
        self._report.start("first token", "waiting for a completion through the whole path")
        block_size = resolve_engine(self._plan.config.decode.engine).block_size
        num_tokens = self._plan.config.decode.handoff.min_remote_tokens + 2 * block_size
        token = self._plan.config.controller.admin_token
        for attempt in range(1, PROOFS + 1):
            answer = await complete_once(
                client, self._plan.url, self._plan.model, num_tokens, PROOF_TIMEOUT_S, auth_headers(token)
            )
            try:
                self._report.done("first token", self._check_path(answer))
                return
            except UnavailableError as error:
                if attempt == PROOFS:
                    self._report.fail("first token", "did not come the whole way")
                    raise
                self._report.update("first token", error.message)
                await asyncio.sleep(1.0)  # sessions between workers may still be connecting

    # -- ready -------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Watch over the services and run `on_ready`. Raises `UnavailableError` when one gives up."""
        try:
            async with _client() as client, asyncio.TaskGroup() as group:
                for spec in self._plan.services:
                    group.create_task(self._supervise(spec, client))
                group.create_task(self._on_ready())
        except* UnavailableError as errors:
            raise errors.exceptions[0] from None

    async def _supervise(self, spec: ServiceSpec, client: httpx.AsyncClient) -> None:
        deaths: deque[float] = deque()
        loop = asyncio.get_running_loop()
        while True:
            await self._running[spec.name].wait()
            service = self._running[spec.name]
            service.kill()  # what it had started, an engine
            self._report.note(escape(_death_notice(service)))
            deaths.append(loop.time())
            while loop.time() - deaths[0] > RESTART_WINDOW_S:
                deaths.popleft()
            if len(deaths) > MAX_RESTARTS:
                self._give_up(spec)
                return
            await asyncio.sleep(min(0.2 * 2 ** (len(deaths) - 1), 5.0))
            try:
                self._running[spec.name] = await ServiceProcess.spawn(spec, service.restarts + 1)
                self._try_save("ready")
                if await self._ready_or_dead(spec, client):
                    self._report.note(f"{spec.name} is back (restart {service.restarts + 1})")
            except OSError as error:
                self._report.note(escape(f"{spec.name} cannot be started again: {error}"))
            except UnavailableError as error:  # alive, and says that it is not: another death
                self._report.note(escape(error.message))
                self._running[spec.name].kill()

    def _give_up(self, spec: ServiceSpec) -> None:
        """A worker is let go while others of its kind, or a decode worker for a prefill worker, remain."""
        message = f"{spec.name} died more than {MAX_RESTARTS} times in {RESTART_WINDOW_S:.0f} s and is given up"
        del self._running[spec.name]
        roles = {service.spec.role for service in self._running.values()}
        if spec.role not in ("prefill", "decode") or "decode" not in roles:
            raise UnavailableError(f"{message}; the cluster cannot go on without it")
        self._report.note(message)
        self._try_save("ready")

    # -- stop --------------------------------------------------------------------------------------------

    async def _stop_all(self, failure: str) -> None:
        self._try_save("stopping", failure)
        with self._report:
            for roles in _STOP_ORDER:
                services = [service for service in self._running.values() if service.spec.role in roles]
                await asyncio.gather(*(self._stop_one(service) for service in services))
                for service in services:
                    del self._running[service.spec.name]
        self._try_save("failed" if failure else "stopped", failure)

    async def _stop_one(self, service: ServiceProcess) -> None:
        name = service.spec.name
        if service.returncode is None:
            self._report.start(name, "stopping")
        stop = asyncio.ensure_future(service.stop(self._options.grace_s))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((stop, hurry), return_when=asyncio.FIRST_COMPLETED)
        if hurry.done():
            service.kill()
        hurry.cancel()
        by_itself = await stop
        if by_itself:
            self._report.done(name, "stopped")
        else:
            self._report.fail(name, f"did not stop in {self._options.grace_s:.0f} s and was killed")


def _death_notice(service: ServiceProcess) -> str:
    lines = tail(service.spec.log)
    indented = "\n".join(f"    {line}" for line in lines.splitlines()) or "    (nothing)"
    return f"{service.spec.name} {service.describe_end()}; the end of {service.spec.log}:\n{indented}"
