"""The terminal while something live is drawn on it."""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Iterator

from rich.console import Console

_LOCAL_FLAGS = 3  # of what tcgetattr returns


@contextlib.contextmanager
def quiet_keys(console: Console) -> Iterator[None]:
    """Ctrl-C shows no `^C`: the terminal writes it at the cursor, which moves away from where a live table ends."""
    try:
        terminal = console.file.fileno()
        before = termios.tcgetattr(terminal)
        if os.tcgetpgrp(terminal) != os.getpgrp():  # in the background the terminal is not ours to set
            raise OSError
    except (OSError, termios.error):
        yield
        return
    quiet = [*before]
    quiet[_LOCAL_FLAGS] = before[_LOCAL_FLAGS] & ~termios.ECHOCTL
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # hung up
            termios.tcsetattr(terminal, termios.TCSANOW, before)
