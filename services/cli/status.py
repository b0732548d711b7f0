"""`nanodeploy status`: the services of this machine's cluster, and the workers that its controller knows.

Exit codes: 0 ready, 1 up but something is wrong, 3 no cluster.
"""

from __future__ import annotations

import json
import os
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from common.errors import NanoDeployError
from common.types import WorkerState
from services.cli.cluster import WorkerView, current, view_cluster, worker_json, worker_table
from services.cli.state import ClusterState, ServiceState, StateFolder, state_root

NO_CLUSTER = 3


async def show_status(name: str, controller: str, as_json: bool, console: Console) -> int:
    """Show it; `controller` (host:port) asks a cluster that `up` did not start. Returns the exit code."""
    state = None if controller else StateFolder(state_root(os.environ), name).running()
    if state is None and not controller:
        if as_json:
            print(json.dumps({"name": name, "phase": "stopped", "services": [], "workers": []}))
        else:
            console.print(f"No cluster {name!r} is up.", highlight=False)
        return NO_CLUSTER
    views: list[WorkerView] = []
    error = ""
    try:
        views = await view_cluster(controller or (state.controller if state else ""))
    except NanoDeployError as failure:
        error = f"controller: {failure.message}"
    if as_json:
        print(json.dumps(_as_json(state, views, error), indent=2))
    else:
        _show(state, views, error, console)
    good = not error and all(not view.error and current(view).state is WorkerState.READY for view in views)
    return 0 if good and (state is None or state.phase == "ready") else 1


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
        table = Table(title="Services", title_justify="left", show_edge=False, pad_edge=False)
        for column in ("service", "pid", "address", "memory", "restarts", "log"):
            table.add_column(column, justify="right" if column in ("pid", "memory", "restarts") else "left")
        for service in state.services:
            alive = service.process.alive
            table.add_row(
                service.name,
                str(service.process.pid) if alive else "[red]dead[/red]",
                service.address,
                f"{memory_of(service) / 2**20:.0f} MiB" if alive else "-",
                str(service.restarts),
                service.log,
            )
        console.print(table)
        console.print()
    if error:
        console.print(f"[red]{error}[/red]", highlight=False)
    else:
        console.print(worker_table(views))
