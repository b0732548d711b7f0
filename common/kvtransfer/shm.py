"""The folder of a user's shared memory segments, so that what a killed process left can be told from other programs'.

UCX takes a segment's name away as soon as the memory is there. A process that is killed before, while the kernel still
fills gigabytes with zeros (and a worker that takes too much memory is killed just then), leaves it, and its memory is
nobody's until the machine restarts.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from common.telemetry import get_logger

SHM: Final = Path("/dev/shm")
STALE_S: Final = 600.0  # no memory takes that long

_log = get_logger(__name__)


def segments_folder(parent: Path = SHM) -> str:
    """Made if it is not there, and cleared of old segments. Empty: UCX shall take its own.

    Where the operator tells UCX how to name segments none come here (`csrc/ucx/transport.cpp`): an old one is nobody's.
    """
    folder = parent / f"nanodeploy-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return ""
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        _log.warning("shared memory segments go elsewhere: this is not a folder of this user's alone", path=str(folder))
        return ""
    for path in folder.iterdir():
        with suppress(OSError):
            segment = path.lstat()
            if time.time() - segment.st_mtime > STALE_S:
                path.unlink()
                _log.warning("a killed process had left memory", path=str(path), mib=segment.st_blocks * 512 >> 20)
    return str(folder)
