"""Runs the checks in order, each within a limit, and shows them."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from collections.abc import Awaitable, Callable

from rich.console import Console
from rich.markup import escape

from common.errors import NanoDeployError
from services.cli.demo_model import DEMO_NAME
from services.cli.doctor import gpus, machine, parts, running
from services.cli.doctor.finding import Finding, Level, fail
from services.cli.doctor.transfer import ucx
from services.cli.state import StateFolder, cache_root, state_root

LIMIT_S = 60.0
_MARKS = {
    Level.OK: "[green]ok  [/green]",
    Level.NOTE: "[yellow]note[/yellow]",
    Level.FAIL: "[red]FAIL[/red]",
    Level.SKIP: "[dim]skip[/dim]",
}

Check = Callable[[], Finding | Awaitable[Finding]]


def checks(model: str, name: str) -> dict[str, Check]:
    """All checks by name, in the order in which they are run."""
    state = StateFolder(state_root(os.environ), name).running()
    api = (("127.0.0.1", 8000),) if state is None else ()
    found: dict[str, Check] = {
        "python": machine.python,
        "packages": machine.versions,
        "compiler": machine.compiler,
        "cores": machine.cores,
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "process reads": machine.process_reads,
        "open files": machine.open_files,
        "locked memory": machine.locked_memory,
        "native libraries": parts.native,
        "kv transfer": ucx,
        "kv transfer on GPUs": gpus.transfer,
        "storage": parts.storage,
        "model": lambda: parts.model(model or _demo_folder()),
    }
    if api:
        found["port"] = lambda: machine.ports(api)
    found |= {
        "services": lambda: running.services(state),
        "workers": lambda: running.workers(state),
        "path": lambda: running.path(state),
    }
    return found


def _demo_folder() -> str:
    """The demo model if it was prepared."""
    folder = cache_root(os.environ) / "models" / DEMO_NAME
    return str(folder) if folder.is_dir() else ""


def run_doctor(model: str, name: str, as_json: bool, console: Console) -> int:
    """Exit code 1 when a check failed."""
    findings: dict[str, Finding] = {}
    for check, run in checks(model, name).items():
        findings[check] = asyncio.run(_run(run))
        if not as_json:
            _show(check, findings[check], console)
    if as_json:
        print(json.dumps([finding.as_json(check) for check, finding in findings.items()], indent=2))
    return 1 if any(finding.level is Level.FAIL for finding in findings.values()) else 0


async def _run(check: Check) -> Finding:
    try:
        async with asyncio.timeout(LIMIT_S):
            result = check()
            return await result if inspect.isawaitable(result) else result
    except TimeoutError:
        return fail(f"no result after {LIMIT_S:.0f} s", "something it needs hangs: report it with the logs")
    except NanoDeployError as error:
        return fail(error.message, "see the message")


def _show(name: str, finding: Finding, console: Console) -> None:
    line = f"{_MARKS[finding.level]} [bold]{name}[/bold]: {escape(finding.detail)}"
    if finding.fix:
        line += f"\n     [bold]fix:[/bold] {escape(finding.fix)}"
    console.print(line, highlight=False, soft_wrap=True)
