"""Shared test set-up: one torch thread, so that parallel tests and engines do not fight for cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
