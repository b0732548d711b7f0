"""`nanodeploy status`: the services of this machine's cluster, and the workers that its controller knows.

Exit codes: 0 ready, 1 up but something is wrong, 3 no cluster.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.text import Text

from common.errors import NanoDeployError
from common.types import Role, WorkerState
from services.cli.cluster import WorkerView, current, view_cluster, worker_json
from services.cli.state import ClusterState, ServiceState, StateFolder, state_root
from services.cli.tables import DEAD, Column, make_table, worker_table

NO_CLUSTER = 3


async def show_status(name: str, controller: str, as_json: bool, console: Console) -> int:
    """Show it; `controller` (host:port) asks a cluster that `up` did not start. Returns the exit code."""
    folder = StateFolder(state_root(os.environ), name)
    state = None if controller else folder.running()
    if state is None and not controller:
        return _not_up(name, "stopped", as_json, console)
    views: list[WorkerView] = []
    error = ""
    try:
        views = await view_cluster(controller or (state.controller if state else ""))
    except NanoDeployError as failure:
        error = f"controller: {failure.message}"
    if state is not None and not views:
        now = folder.running()
        if now is None or now.phase == "stopping":  # it ended meanwhile
            return _not_up(name, "stopped" if now is None else "stopping", as_json, console)
    if as_json:
        print(json.dumps(_as_json(state, views, error), indent=2))
    else:
        _show(state, views, error, console)
    return 0 if not error and _is_well(state, views) else 1


def _is_well(state: ClusterState | None, views: list[WorkerView]) -> bool:
    """All that is there works, and it is enough to serve."""
    if state is not None and (state.phase != "ready" or not all(s.process.alive for s in state.services)):
        return False
    ready = [not view.error and current(view).state is WorkerState.READY for view in views]
    return all(ready) and any(view.info.role is Role.DECODE for view in views)


def _not_up(name: str, phase: str, as_json: bool, console: Console) -> int:
    if as_json:
        print(json.dumps({"name": name, "phase": phase, "services": [], "workers": []}))
    elif phase == "stopping":
        console.print(f"Cluster {name!r} is stopping.", highlight=False)
    else:
        console.print(f"No cluster {name!r} is up.", highlight=False)
    return NO_CLUSTER


def _as_json(state: ClusterState | None, views: list[WorkerView], error: str) -> dict[str, Any]:
    result: dict[str, Any] = {"error": error}
    if state is not None:
        result |= {
            "name": state.name,
            "phase": state.phase,
            "url": state.url,
            "controller": state.controller,
            "model": state.model,
            "launcher_pid": state.launcher.pid,
            "services": [_service_json(service) for service in state.services],
        }
    result["workers"] = [worker_json(view) for view in views]
    return result


def _service_json(service: ServiceState) -> dict[str, Any]:
    return {
        "name": service.name,
        "role": service.role,
        "pid": service.process.pid,
        "alive": service.process.alive,
        "address": service.address,
        "restarts": service.restarts,
        "rss_bytes": memory_of(service),
        "log": service.log,
    }


def memory_of(service: ServiceState) -> int:
    """Resident bytes of the service and of the processes it started; 0 when it is gone."""
    if not service.process.alive:
        return 0
    total = 0
    try:
        process = psutil.Process(service.process.pid)
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # what was counted so far
    return total


def _show(state: ClusterState | None, views: list[WorkerView], error: str, console: Console) -> None:
    if state is not None:
        console.print(
            f"Cluster [bold]{state.name}[/bold] is {state.phase}: {state.url}, model {state.model}", highlight=False
        )
        services = state.services
        columns = (
            Column("service", tuple(s.name for s in services)),
            Column("pid", tuple(str(s.process.pid) if s.process.alive else DEAD for s in services)),
            Column("address", tuple(s.address for s in services), leave=1),
            Column("memory", tuple(f"{memory_of(s) / 2**20:.0f} MiB" if s.process.alive else "-" for s in services)),
            Column("restarts", tuple(str(s.restarts) for s in services)),
        )
        console.print(make_table("Services", columns, console.width))
        for folder in sorted({str(Path(s.log).parent) for s in services}):
            console.print(f"Logs are in {folder}", highlight=False, markup=False, soft_wrap=True)
        console.print()
    if error:
        console.print(Text(error, style="red", no_wrap=True, overflow="ellipsis"))
    else:
        console.print(worker_table(views, console.width))
