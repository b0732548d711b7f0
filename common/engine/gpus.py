"""Is there a GPU, and how many? Told from the driver's files, without torch, alike by launcher, doctor and engine.

The two answers differ on purpose. `has_driver` asks what `device: auto` becomes: "cuda" wherever the driver runs, so
that a GPU which cannot be used is an error of the engine (its torch finds none) and never a quiet turn to the CPU.
`num_gpus` asks how many engines may have: none in a container that was given no device, or where CUDA_VISIBLE_DEVICES
hides them all, though the driver runs. Kernels and digests, which have torch, ask torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")


def has_driver(file: Path = DRIVER) -> bool:
    """Does NVIDIA's driver run on this machine?"""
    return file.exists()


def num_gpus(environ: Mapping[str, str], folder: Path = DEVICES) -> int:
    """How many torch will see: those of the driver, or fewer by CUDA_VISIBLE_DEVICES."""
    found = sum(path.name.removeprefix("nvidia").isdigit() for path in folder.glob("nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([name for name in visible.split(",") if name.strip()]))
