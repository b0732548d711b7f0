"""Does UCX move and verify bytes between two processes of this machine, over what, and how fast?

The child owns 4 MiB of random bytes; the parent reads them one-sided and checks their digest, as a decode worker
does with a prefill worker's KV. `python -m services.cli.doctor.transfer CONFIG_JSON` is the child.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from pathlib import Path

import msgspec

import services
from common.config.schema import UcxConfig
from common.errors import ConfigError, KVTransferError, NanoDeployError
from common.kernels.native import DigestGeometry, digest
from common.kvtransfer.transport import DigestCheck, Endpoint, PeerDown, ReadPiece, ReadResult, ReadStatus
from common.kvtransfer.ucx import UcxTransport
from services.cli.doctor.finding import Finding, fail, note, ok

GROUP = "doctor"
TOKEN_NBYTES = 1024
NUM_TOKENS = 4096
NBYTES = TOKEN_NBYTES * NUM_TOKENS
NUM_READS = 8
READ_LIMIT_S = 10.0
SLOW_GBPS = 1.0


class Offer(msgspec.Struct, frozen=True):
    endpoint: Endpoint
    digest: int


async def ucx() -> Finding:
    """Read the child's bytes a few times; the best of them counts."""
    config = UcxConfig()
    try:
        transport = UcxTransport(config)
    except ConfigError as error:
        return fail(error.message, "make setup (installs libucx-cu13), or set decode.ucx.library to a libucp")
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.cli.doctor.transfer",
        config.model_dump_json(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(services.__file__).parent.parent,
    )
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        async with asyncio.timeout(READ_LIMIT_S):
            line = await child.stdout.readline()
            if not line:
                said = (await child.stderr.read()).decode(errors="replace").strip()
                return fail(f"the process to read from did not start: {said[-500:]}", "see the message")
        offer = msgspec.json.decode(line, type=Offer)
        seconds, over = await _read_all(transport, offer)
    except (KVTransferError, TimeoutError) as error:
        return fail(
            f"no verified read between two processes: {error or 'no answer in time'}",
            "see UCX_LOG_LEVEL=info; containers may need --cap-add SYS_PTRACE and a larger /dev/shm",
        )
    finally:
        version = transport.library_version
        transport.close()
        if child.stdin is not None:
            child.stdin.close()
        await child.wait()
    gbps = NBYTES / seconds / 1e9
    detail = f"UCX {version}: {NBYTES >> 20} MiB read and verified over {over} at {gbps:.1f} GB/s"
    if gbps < SLOW_GBPS:
        return note(detail, "slow for one machine: see the checks `process reads` and `cores`")
    return ok(detail)


async def _read_all(transport: UcxTransport, offer: Offer) -> tuple[float, str]:
    """Seconds of the fastest read, and what it went over. Raises `KVTransferError`."""
    base = transport.allocate(GROUP, NBYTES)
    peer = transport.connect(offer.endpoint)
    check = DigestCheck(
        segments=((base, 0, NUM_TOKENS),),
        num_layers=1,
        num_parts=1,
        layer_stride=NBYTES,
        part_stride=NBYTES,
        token_stride=TOKEN_NBYTES,
        token_nbytes=TOKEN_NBYTES,
        expected=offer.digest,
    )
    best = float("inf")
    for read_id in range(1, NUM_READS + 1):
        ctypes.memset(base, 0, NBYTES)
        transport.read(peer, read_id, [ReadPiece(GROUP, 0, base, NBYTES)], [check])
        result = await _result(transport)
        if isinstance(result, PeerDown) or result.status is not ReadStatus.OK:
            raise KVTransferError(f"{'peer down' if isinstance(result, PeerDown) else result.status}: {result.message}")
        best = min(best, result.seconds)
    return best, transport.describe(peer)


async def _result(transport: UcxTransport) -> ReadResult | PeerDown:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(READ_LIMIT_S):
        while not (events := transport.poll()):
            readable = asyncio.Event()
            loop.add_reader(transport.wakeup_fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(transport.wakeup_fd)
    return events[0]


def offer_bytes(config: UcxConfig) -> None:
    """The child: own random bytes, say where they are, and keep them until stdin closes."""
    transport = UcxTransport(config)
    try:
        base = transport.allocate(GROUP, NBYTES)
        ctypes.memmove(base, os.urandom(NBYTES), NBYTES)
        geometry = DigestGeometry(1, 1, NBYTES, NBYTES, TOKEN_NBYTES, TOKEN_NBYTES)
        offer = Offer(transport.endpoint(), digest(geometry, [(base, 0, NUM_TOKENS)]))
        print(msgspec.json.encode(offer).decode(), flush=True)
        sys.stdin.read()
    finally:
        transport.close()


if __name__ == "__main__":
    try:
        offer_bytes(UcxConfig.model_validate_json(sys.argv[1]))
    except NanoDeployError as failure:
        sys.exit(failure.message)
