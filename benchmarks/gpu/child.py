"""One stage in a process of its own: `python -m benchmarks.gpu.child STAGE FOLDER RESULTS OUTPUT [--dry-run]`.

RESULTS is a file with what earlier stages found; what this one finds goes to the file OUTPUT.

It leads a process group, and its standard input is a pipe that ends with whoever started it, however that ends. The
stage is stopped then, and so is all that it has started: nobody is there to free the GPU later.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from benchmarks import cluster
from benchmarks.gpu.stages import STAGES, Context

STOP_S = 30.0


def _follow(orphaned: threading.Event) -> None:
    """Wait for the parent's end; then stop this process, kindly first, so that it stops its clusters."""
    while os.read(0, 4096):
        pass
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    cluster.stop_on_sigterm()
    orphaned = threading.Event()
    threading.Thread(target=_follow, args=(orphaned,), daemon=True).start()
    try:
        run()
    finally:
        if orphaned.is_set():
            os.killpg(os.getpid(), signal.SIGKILL)


def run() -> None:
    name, folder, results, output = sys.argv[1:5]
    (stage,) = (stage for stage in STAGES if stage.name == name)
    earlier = json.loads(Path(results).read_text(encoding="utf-8"))
    found = stage.call(Context(Path(folder), "--dry-run" in sys.argv, earlier))
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
