"""`python -m services.prefill_worker --config FILE`: one prefill worker."""

from __future__ import annotations

import os
import sys

from common.types import Role
from services.prefill_worker.part import PrefillPart
from services.worker.main import run_worker

if __name__ == "__main__":
    sys.exit(run_worker(Role.PREFILL, PrefillPart, sys.argv[1:], os.environ))
