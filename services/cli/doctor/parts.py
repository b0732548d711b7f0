"""Checks of our own parts: native libraries, storage, the model folder."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

from common.errors import NanoDeployError
from services.cli.doctor.finding import Finding, fail, note, ok, skip
from services.cli.plan import valkey_server
from services.cli.ports import Ports
from services.cli.process import ServiceProcess, ServiceSpec, tail

START_LIMIT_S = 10.0


def native() -> Finding:
    """The CPU kernels load; which instruction sets they will use here."""
    from common.kernels.native import cpu_features

    try:
        features = cpu_features()
    except NanoDeployError as error:
        return fail(error.message, "make native")
    return ok(f"CPU kernels use {', '.join(features) or 'portable code'}")


async def storage() -> Finding:
    """Valkey from the wheel starts and answers."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Ports() as ports:
        port = ports.take("127.0.0.1", 0)
        log = Path(folder) / "valkey.log"
        argv = (str(valkey_server()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder)
        spec = ServiceSpec(
            name="storage",
            role="storage",
            argv=argv,
            env=os.environ,
            cwd=Path(folder),
            log=log,
            address=f"127.0.0.1:{port}",
        )
        process = await ServiceProcess.spawn(spec)
        try:
            while (version := await _server_version(port)) is None:
                if process.returncode is not None or time.monotonic() - started > START_LIMIT_S:
                    return fail(f"Valkey does not start: {tail(log, 3)}", "use another server: up --redis-url URL")
                await asyncio.sleep(0.02)
        finally:
            await process.stop(5.0)
    return ok(f"Valkey {version} started and answered in {(time.monotonic() - started) * 1e3:.0f} ms")


async def _server_version(port: int) -> str | None:
    """What the server answers to INFO; None when it does not listen or is loading."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"INFO server\r\n")
                head = await reader.readline()  # $LENGTH of what follows, or -ERROR
                body = await reader.readexactly(int(head[1:])) if head.startswith(b"$") else b""
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return None
    fields = dict(line.split(":", 1) for line in body.decode().splitlines() if ":" in line)
    return fields.get("valkey_version") or fields.get("redis_version")


def model(folder: str) -> Finding:
    """The folder is of a supported architecture and complete, and its texts can be read."""
    from common.models.spec import ModelSpec
    from common.text import Tokenizer

    if not folder:
        return skip("no model named: --model PATH checks one")
    path = Path(folder).expanduser()
    try:
        spec = ModelSpec.from_folder(path)
    except NanoDeployError as error:
        return fail(error.message, "download the whole checkpoint again, or choose a supported model")
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    detail = f"{spec.architecture}, {spec.num_layers} layers, {spec.dtype}, {nbytes / 2**30:.2f} GiB of weights"
    if not (path / "tokenizer.json").is_file():
        return note(f"{detail}; no tokenizer.json", "text prompts need it: save one with transformers' fast tokenizer")
    try:
        Tokenizer.load(path)
    except NanoDeployError as error:
        return fail(f"{detail}; {error.message}", "the router needs it for text: download the whole checkpoint again")
    return ok(detail)
