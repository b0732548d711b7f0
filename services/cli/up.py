"""`up`, `serve` and `down`: one launcher process per cluster, in the foreground or detached.

Detached, the launcher runs in a session of its own with its output in `launcher.log`; the command shows that
log until the cluster is ready or has failed, and returns. It is the same launcher: it restarts what dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console

import nanodeploy
import services
from common.config.load import load_named
from common.config.schema import EngineConfig
from common.engine.sizing import resolve_engine, size_engine
from common.errors import UnavailableError
from common.models.spec import ModelSpec
from common.rpc.tls import configure_tls
from common.types import Role
from services.cli.demo_model import ensure_demo_model
from services.cli.hint import hint, program
from services.cli.launcher import Launcher, LaunchOptions
from services.cli.live import check_path, live_table, print_banner, print_workers
from services.cli.options import check_model_folder
from services.cli.plan import ClusterPlan, ClusterRequest, build_plan
from services.cli.ports import Ports
from services.cli.probe import Answer
from services.cli.process import end_leftovers, kill_service
from services.cli.report import Report
from services.cli.state import StateFolder, cache_root, service_of, state_root
from services.cli.terminal import quiet_keys

POLL_S = 0.1
STOP_S = 10.0  # what a service needs to end beside its grace


@dataclass(frozen=True)
class UpOptions:
    name: str = "default"
    config: str | None = None
    ready_timeout_s: float = 300.0
    program: str = ""  # what the user calls this command by, when another process speaks


def run_up(request: ClusterRequest, options: UpOptions, detach: bool, console: Console) -> int:
    """Run a cluster until it is stopped, or detached until it is ready. Returns the exit code.

    What is wrong with flags, ports or the model is a `ConfigError` before anything is started.
    """
    folder = StateFolder(state_root(os.environ), options.name)
    config = options.config and str(Path(options.config).absolute())
    options = replace(options, config=config, program=program())
    base, named = load_named(config, os.environ)
    with folder.hold() as lock:
        before = folder.read()
        end_leftovers([service.process for service in before.services] if before is not None else [])
        with _ports() as ports:  # flags and ports first: a model may take minutes to prepare
            plan = build_plan(base, request, folder.path, ports, os.environ, named)
        engines = _engines(plan, request)
        for engine, role in engines:
            resolve_engine(engine, role)
        request = replace(request, model=resolve_model(request.model or base.decode.engine.model, console))
        spec = ModelSpec.from_folder(request.model, weights=False)  # an unknown family is said first
        if base.decode.engine.load_format != "dummy":
            spec = ModelSpec.from_folder(request.model)  # what a config does not say its weight files do
        sizings = [size_engine(engine, spec, role) for engine, role in engines]
        if request.num_prefill and any(sizing.spec.pooling is not None for sizing in sizings):
            console.print("Texts are embedded where they are placed: no prefill workers are started.")
            request = replace(request, num_prefill=0)
        if detach:
            return _detach(folder, lock, request, options, console)
        return asyncio.run(_run(folder, request, options, console))


def launch_detached(path: Path, lock: int, console: Console) -> int:
    """What the hidden `launch` command runs: a launcher with the request in `path` that inherited `lock`."""
    os.set_inheritable(lock, False)
    request, options = msgspec.json.decode(path.read_bytes(), type=tuple[ClusterRequest, UpOptions])
    return asyncio.run(_run(StateFolder(state_root(os.environ), options.name), request, options, console))


def _engines(plan: ClusterPlan, request: ClusterRequest) -> list[tuple[EngineConfig, Role]]:
    """One engine's config of each role that the cluster has."""
    engines = [(plan.config.decode.engine, Role.DECODE)]
    return [(plan.config.prefill.engine, Role.PREFILL), *engines] if request.num_prefill else engines


def _ports() -> Ports:
    return Ports(lambda pid: service_of(state_root(os.environ), pid))


async def _run(folder: StateFolder, request: ClusterRequest, options: UpOptions, console: Console) -> int:
    base, named = load_named(options.config, os.environ)
    with _ports() as ports, quiet_keys(console):
        plan = build_plan(base, request, folder.path, ports, os.environ, named)
        configure_tls(plan.config.tls)
        for note in plan.notes:
            console.print(note, highlight=False, markup=False)
        console.print(f"Starting cluster [bold]{folder.name}[/bold] with {plan.model}", highlight=False)

        embeds = needs_key = False

        def path_taken(answer: Answer) -> str:
            nonlocal embeds, needs_key
            embeds, needs_key = answer.embedding_size > 0, answer.needs_key
            return check_path(answer, request.num_prefill)

        async def announce() -> None:
            chat = hint('chat "Why is the sky blue?"', folder.name, options.program)
            print_banner(plan, chat, console, embeds=embeds, needs_key=needs_key)
            if not console.is_terminal:
                await print_workers(plan.controller, console)

        async def when_ready() -> None:
            if console.is_terminal:
                await live_table(plan.controller, console)

        launcher = Launcher(
            folder,
            plan,
            LaunchOptions(
                version=nanodeploy.__version__,
                ready_timeout_s=options.ready_timeout_s,
                grace_s=STOP_S
                + max(s.drain_grace_s for s in (plan.config.router, plan.config.prefill, plan.config.decode)),
            ),
            Report(console),
            path_taken,
            announce,
            when_ready,
        )
        return await launcher.run()


def resolve_model(model: str, console: Console) -> str:
    """A checked model folder; the demo model, prepared on first use, when none is named."""
    if model:
        return check_model_folder(model)
    console.print("Preparing the demo model SmolLM2-135M-Instruct", highlight=False)
    with Report(console) as report:
        report.start("demo model")
        path = ensure_demo_model(cache_root(os.environ), lambda text: report.update("demo model", text))
        report.done("demo model", str(path))
    return check_model_folder(str(path))


def _detach(folder: StateFolder, lock: int, request: ClusterRequest, options: UpOptions, console: Console) -> int:
    folder.prepare()
    launch_file, log = folder.path / "launch.json", folder.path / "launcher.log"
    launch_file.write_bytes(msgspec.json.encode((request, options)))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "launch", str(launch_file), str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=Path(services.__file__).parent.parent,
            start_new_session=True,
            pass_fds=(lock,),
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _follow(folder, process, log, console.out)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code is None:
        console.print(f"The cluster runs on; `{hint('down', folder.name)}` stops it.", highlight=False)
    return code or 0


def _follow(
    folder: StateFolder, process: subprocess.Popen[bytes], log: Path, show: Callable[[str], None]
) -> int | None:
    """Show the launcher's log until its cluster is ready (None) or it has ended (its exit code).

    A launcher announces its cluster before it says in its state that it is ready, so nothing of that is missed.
    """
    with log.open(encoding="utf-8") as lines:
        while True:
            code = process.poll()
            state = folder.read()
            ready = state is not None and state.launcher.pid == process.pid and state.phase == "ready"
            text = lines.read()
            if text:
                show(text.rstrip("\n"))
            if ready or code is not None:
                return code
            time.sleep(POLL_S)


def stop(name: str, console: Console) -> int:
    """Stop a cluster that some launcher on this machine runs. Returns the exit code."""
    folder = StateFolder(state_root(os.environ), name)
    state = folder.read()
    if state is None or not (state.launcher.alive or any(s.process.alive for s in state.services)):
        raise UnavailableError(f"no cluster {name!r} is up")
    if state.launcher.alive:
        with console.status(f"Stopping cluster {name}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.launcher.pid, signal.SIGTERM)
            deadline = time.monotonic() + state.stop_limit_s
            while state.launcher.alive and time.monotonic() < deadline:
                time.sleep(POLL_S)
    if state.launcher.alive:
        console.print(f"The launcher (pid {state.launcher.pid}) does not stop and is killed", highlight=False)
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.launcher.pid, signal.SIGKILL)
    state = folder.read() or state
    for service in state.services:
        if service.process.alive:
            console.print(f"{service.name} (pid {service.process.pid}) was left over and is killed", highlight=False)
            kill_service(service.process)
    console.print(f"Cluster {name} is stopped.", highlight=False)
    return 0
