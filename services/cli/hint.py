"""Commands in messages, so that they can be pasted: spelt the way this one was called, for the cluster meant."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "nanodeploy"
DEFAULT_NAME = "default"


def program() -> str:
    """`nanodeploy` where the shell finds it, else the path it was called by."""
    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return PROGRAM
    found = shutil.which(PROGRAM)
    if found is not None and Path(found).resolve() == called.resolve():
        return PROGRAM
    short = os.path.relpath(called)
    return shlex.quote(str(called.absolute()) if short.startswith("..") else short)


def hint(words: str, name: str, called: str = "") -> str:
    """`words` as a command line about the cluster `name`; `called` is the `program` of another process."""
    which = "" if name == DEFAULT_NAME else f" --name {name}"
    return f"{called or program()} {words}{which}"
