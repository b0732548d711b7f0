"""Runs one command that ends when its parent does: `python child.py PARENT_PID COMMAND ARGS...`.

The kernel sends SIGTERM to this process (and to what it becomes: the setting survives exec) when the parent
dies, however it dies. Started by path with `-I -S`, so it costs an interpreter start and nothing else.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
