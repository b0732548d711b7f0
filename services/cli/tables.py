"""Workers and services as tables that fit the terminal: one line each, columns that have no room are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from common.types import Role
from services.cli.cluster import WorkerView, current

GAP = 2  # cells between two columns
_NUMBERS = ("pid", "run", "wait", "tok/s", "memory", "restarts")


@dataclass(frozen=True)
class Column:
    name: str
    cells: tuple[str, ...]
    leave: int = 0  # the higher the sooner it goes when room is short; 0 stays

    @property
    def width(self) -> int:
        return max(cell_len(line) for text in (self.name, *self.cells) for line in text.split("\n"))


def make_table(title: str, columns: Sequence[Column], width: int) -> Table:
    """Those columns that fit into `width` cells; what is too wide even so is cut."""
    shown = list(columns)
    while sum(c.width + GAP for c in shown) - GAP > width and any(c.leave for c in shown):
        shown.remove(max(shown, key=lambda column: column.leave))
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )
    for column in shown:
        table.add_column(column.name, justify="right" if column.name in _NUMBERS else "left", no_wrap=True)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell, style="red" if cell in _ALARMS else "") for cell in row))
    return table


NO_ANSWER = "no answer"
DEAD = "dead"
_ALARMS = (NO_ANSWER, DEAD)


def worker_table(views: Sequence[WorkerView], width: int) -> Table:
    """For people. KV is blocks of the first group: live/cached/leased/in flight of total."""
    infos = [current(view) for view in views]
    return make_table(
        "Workers",
        (
            Column("worker", tuple(info.ref.worker_id for info in infos)),
            Column("role", tuple(info.role.value for info in infos), leave=3),
            Column("state", tuple(NO_ANSWER if view.error else current(view).state.value for view in views)),
            Column("address", tuple(info.ref.address for info in infos), leave=5),
            Column("pid", tuple(str(info.pid or "-") for info in infos), leave=4),
            Column("run", tuple(str(info.load.running) for info in infos)),
            Column("wait", tuple(str(info.load.waiting) for info in infos)),
            Column("tok/s", tuple(f"{info.load.tokens_per_s:.0f}" for info in infos)),
            Column("KV live/cached\nleased/moving", tuple(_kv(view) for view in views), leave=1),
            Column("KV moved by", tuple(_moved_by(view) for view in views), leave=2),
        ),
        width,
    )


def _kv(view: WorkerView) -> str:
    states = current(view).load.kv_states[:1]
    return "".join(f"{s.live}/{s.cached}/{s.leased}/{s.in_flight} of {s.total}" for s in states)


def _moved_by(view: WorkerView) -> str:
    """The transports in use and how many prefill workers each reaches; what a prefill worker offers."""
    if view.info.role is not Role.DECODE or view.status is None:
        return f"offers {', '.join(view.info.transports)}" if view.info.transports else ""
    sources: dict[str, list[str]] = {}
    for peer in view.status.peers:
        sources.setdefault(peer.transport or peer.state, []).append(peer.ref.worker_id)
    return ", ".join(
        f"{way} <- {names[0] if len(names) == 1 else f'{len(names)} workers'}" for way, names in sources.items()
    )
