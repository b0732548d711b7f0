"""Builds nanodeploy-client, the wheel that other people's environments get: `nanodeploy.v1` and nothing else.

It has no `nanodeploy/__init__.py`, so it shares the name with the whole product's wheel without a conflict. The
result is installed into an environment of its own and used there before it counts as built.

    python clients/build.py DIST_FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "nanodeploy-client"
version = "{version}"
description = "The gRPC contracts of NanoDeploy: messages and stubs, nothing else"
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = [{dependencies}]

[tool.setuptools]
packages = ["nanodeploy.v1"]

[tool.setuptools.package-data]
"nanodeploy.v1" = ["*.pyi", "*.proto", "py.typed"]
"""

CHECK = """\
import importlib.util, sys
from nanodeploy.v1 import decode_pb2, decode_pb2_grpc, controller_pb2_grpc, prefill_pb2_grpc, worker_pb2_grpc
request = decode_pb2.SubmitRequest(router_id="r")
request.request.prompt_token_ids.extend([1, 2, 3])
assert decode_pb2.SubmitRequest.FromString(request.SerializeToString()) == request
import grpc
assert decode_pb2_grpc.DecodeServiceStub(grpc.insecure_channel("127.0.0.1:1")).Submit
assert "torch" not in sys.modules and importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("nanodeploy.llm") is None
print("checked: imports, serializes and makes stubs without torch")
"""


def stage(folder: Path) -> None:
    """Lay out the sources of the wheel in `folder`."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = [d for d in whole["dependencies"] if d.split(">")[0] in ("grpcio", "protobuf")]
    text = PYPROJECT.format(version=whole["version"], dependencies=", ".join(f'"{d}"' for d in dependencies))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copy(ROOT / "clients" / "README.md", folder / "README.md")
    package = folder / "nanodeploy" / "v1"
    package.mkdir(parents=True)
    generated = sorted((ROOT / "nanodeploy" / "v1").glob("*_pb2*.py*"))
    if not generated:
        raise SystemExit("nanodeploy/v1 is empty: run `make stubs` first")
    for source in [*generated, *sorted((ROOT / "proto" / "nanodeploy" / "v1").glob("*.proto"))]:
        if source.suffix in (".py", ".pyi", ".proto"):
            shutil.copy(source, package)
    (package / "__init__.py").write_text('"""The contracts of NanoDeploy, version 1."""\n', encoding="utf-8")
    (package / "py.typed").touch()


def build(target: Path) -> Path:
    """Build the wheel into `target` and return its path."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        stage(Path(temporary))
        pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), temporary)
    return max(target.glob("nanodeploy_client-*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def check(wheel: Path) -> None:
    """Install the wheel into an empty environment and use it there."""
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(temporary, with_pip=True)
        python = f"{temporary}/bin/python"
        pip(python, "install", str(wheel))
        subprocess.run([python, "-I", "-W", "error", "-c", CHECK], check=True, cwd=temporary)


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def main() -> None:
    wheel = build(Path(sys.argv[1]).resolve())
    check(wheel)
    print(wheel)


if __name__ == "__main__":
    main()
