"""`python -m services.decode_worker --config FILE`: one decode worker."""

from __future__ import annotations

import os
import sys

from common.types import Role
from services.decode_worker.part import DecodePart
from services.worker.main import run_worker

if __name__ == "__main__":
    sys.exit(run_worker(Role.DECODE, DecodePart, sys.argv[1:], os.environ))
