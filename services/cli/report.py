"""Progress for people: which steps run, what each waits for, how long each took.

On a terminal the running steps are a live list with spinners; elsewhere each start and end is a line.
"""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.text import Text

QUIET_S = 3.0  # between lines about one step, off a terminal


def make_console(*, stderr: bool = False) -> Console:
    """Off a terminal lines are not cut to a guessed width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200)


class Report:
    """Use as a context manager around the steps; `note` works outside as well."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._running: dict[str, tuple[float, str]] = {}
        self._said: dict[str, float] = {}
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> Report:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._running.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

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

    def _render(self) -> Group:
        now = time.monotonic()
        rows = []
        for name, (started, text) in self._running.items():
            frame = self._spinner.render(now)
            mark = frame if isinstance(frame, Text) else Text(" ")
            rows.append(Text.assemble("  ", mark, f" {name}: {text or 'starting'} ", (f"{now - started:.0f} s", "dim")))
        return Group(*rows)
