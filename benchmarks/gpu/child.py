"""One stage in a process of its own: `python -m benchmarks.gpu.child STAGE FOLDER RESULTS OUTPUT [--dry-run]`.

RESULTS is a file with what earlier stages found; what this one finds goes to the file OUTPUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import cluster
from benchmarks.gpu.stages import STAGES, Context


def main() -> None:
    name, folder, results, output = sys.argv[1:5]
    cluster.stop_on_sigterm()
    (stage,) = (stage for stage in STAGES if stage.name == name)
    earlier = json.loads(Path(results).read_text(encoding="utf-8"))
    found = stage.call(Context(Path(folder), "--dry-run" in sys.argv, earlier))
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
