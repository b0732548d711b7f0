"""Shared test set-up: one torch thread, so that parallel tests and engines do not fight for cores.

Property tests draw anew on a developer's machine and repeat themselves in CI; neither has a time limit per
example, since a busy machine would fail it.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
