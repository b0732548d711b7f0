"""Progress for people: which steps run, what each waits for, how long each took.

On a terminal the running steps are a live list with spinners; elsewhere each start and end is a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

QUIET_S = 3.0  # between lines about one step, off a terminal
FRAME_S = 0.125


class _Lossy:
    """A file that takes everything: what cannot be written (the terminal is gone, the disk is full) is lost."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def make_console(*, stderr: bool = False, lossy: bool = False) -> Console:
    """Off a terminal lines are not cut to a guessed width. `lossy`: for who has more to do than to be read."""
    file = cast(IO[str], _Lossy(sys.stdout)) if lossy else None
    console = Console(file=file, stderr=stderr)
    return console if console.is_terminal else Console(file=file, stderr=stderr, width=200)


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage that is told of by (stage, done, total); nothing off a terminal. They go at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done, total=total)

        yield tell


class Report:
    """Use as a context manager around the steps; `note` works outside as well.

    In an event loop frames are drawn by the loop: a thread that draws beside lines being printed loses count of
    the lines on the screen and leaves some behind.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._running: dict[str, tuple[float, str]] = {}
        self._said: dict[str, float] = {}
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._frame: asyncio.TimerHandle | None = None

    def __enter__(self) -> Report:
        if self.console.is_terminal:
            try:
                self._loop = asyncio.get_running_loop()
            except RuntimeError:
                self._loop = None
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                auto_refresh=self._loop is None,
                refresh_per_second=1 / FRAME_S,
                transient=True,
            )
            self._live.start()
            self._draw()
        return self

    def _draw(self) -> None:
        if self._live is not None and self._loop is not None:
            self._live.refresh()
            self._frame = self._loop.call_later(FRAME_S, self._draw)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._frame is not None:
            self._frame.cancel()
            self._frame = None
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._running.clear()

    def start(self, name: str, text: str = "") -> None:
        self._running[name] = (time.monotonic(), text)
        if self._live is None:
            self.console.print(f"  … {escape(name)}: {escape(text or 'starting')}", highlight=False)

    def update(self, name: str, text: str) -> None:
        """Say what a running step waits for; off a terminal a line now and then, and only when it is news."""
        if name not in self._running or self._running[name][1] == text:
            return
        self._running[name] = (self._running[name][0], text)
        if self._live is None and time.monotonic() - self._said.get(name, 0.0) > QUIET_S:
            self._said[name] = time.monotonic()
            self.console.print(f"  … {escape(name)}: {escape(text)}", highlight=False)

    def done(self, name: str, text: str = "") -> None:
        self._end("[green]✓[/green]", name, text or "ready")

    def fail(self, name: str, text: str) -> None:
        self._end("[red]✗[/red]", name, text)

    def note(self, text: str) -> None:
        """A line of markup."""
        self.console.print(text, highlight=False)

    def _end(self, mark: str, name: str, text: str) -> None:
        started, _ = self._running.pop(name, (time.monotonic(), ""))
        took = time.monotonic() - started
        self.console.print(f"  {mark} {escape(name)}: {escape(text)} [dim]({took:.1f} s)[/dim]", highlight=False)
        if self._live is not None:
            self._live.refresh()  # without the row of what has ended

    def _render(self) -> Group:
        now = time.monotonic()
        rows = []
        for name, (started, text) in self._running.items():
            frame = self._spinner.render(now)
            mark = frame if isinstance(frame, Text) else Text(" ")
            rows.append(Text.assemble("  ", mark, f" {name}: {text or 'starting'} ", (f"{now - started:.0f} s", "dim")))
        return Group(*rows)
