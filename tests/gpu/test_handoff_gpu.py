"""KV from GPU to GPU: between two processes, one GPU or two, and between two engines. Nothing of it is the host's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_models
import torch
from device_owner import BLOCK_SIZE, DeviceEnd, DeviceOwner, make_layout
from engine_support import Answer, Answers, Pair, greedy, prompts, reference_tokens

from common.config import EngineConfig, HandoffConfig, WorkerConfig
from common.engine.build import BuiltEngine, build_engine
from common.kvcache.layout import FULL_GROUP
from common.kvtransfer.memory import MemoryNetwork
from common.kvtransfer.orders import OrderExtent
from common.kvtransfer.plan import plan_extent
from common.kvtransfer.transport import PeerDown, ReadResult, ReadStatus
from common.types import MonotonicClock, Role

pytestmark = pytest.mark.gpu

NUM_BLOCKS = 64
SEED = 11
LAYOUT = make_layout(NUM_BLOCKS)


@pytest.fixture(scope="module")
def gpus() -> tuple[int, int]:
    """The owner's and the reader's: two where there are two."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return 0, torch.cuda.device_count() - 1


@pytest.fixture(scope="module")
def owner(gpus: tuple[int, int]) -> Iterator[DeviceOwner]:
    owner = DeviceOwner(LAYOUT, gpus[0], SEED)
    yield owner
    owner.stop()


@pytest.fixture
def reader(gpus: tuple[int, int]) -> Iterator[DeviceEnd]:
    end = DeviceEnd(LAYOUT, torch.device("cuda", gpus[1]))
    yield end
    end.close()


def extent(digests: tuple[int, ...], blocks: range = range(NUM_BLOCKS)) -> OrderExtent:
    per_block = LAYOUT.num_digests(FULL_GROUP)
    return OrderExtent(
        order_id=1,
        lease_id=1,
        group=FULL_GROUP,
        start_position=blocks.start * BLOCK_SIZE,
        num_tokens=len(blocks) * BLOCK_SIZE,
        block_ids=tuple(blocks),
        prefix_hash=b"",
        digests=digests[blocks.start * per_block : blocks.stop * per_block],
    )


def read(end: DeviceEnd, peer: int, read_id: int, of: OrderExtent, places: list[int]) -> None:
    """`places`: the reader's block for each block of the owner's prompt."""
    plan = plan_extent(LAYOUT, LAYOUT, of, places, end.bases[FULL_GROUP], NUM_BLOCKS * BLOCK_SIZE)
    end.transport.read(peer, read_id, plan.pieces, plan.checks)


def only(events: list[ReadResult | PeerDown]) -> ReadResult:
    assert len(events) == 1, events
    assert isinstance(events[0], ReadResult), events
    return events[0]


def same(end: DeviceEnd, seed: int, blocks: list[int], places: list[int]) -> None:
    """Does the reader hold the numbers that the owner made from `seed`?"""
    generator = torch.Generator(end.device).manual_seed(seed)
    for name in ("kv", "index"):
        region = end.pool.region(name)
        made = torch.randn(region.shape, generator=generator, device=end.device, dtype=torch.float32)
        assert torch.equal(region[places], made.to(region.dtype)[blocks]), name


def test_blocks_are_read_where_they_lie_and_verified(owner: DeviceOwner, reader: DeviceEnd) -> None:
    """Scattered places; what is not read, the padding block above all, stays as it was."""
    places = torch.randperm(NUM_BLOCKS).tolist()
    blocks = range(8, 40)
    reader.pool.region("kv").fill_(3.0)
    reader.pool.region("index").fill_(3.0)
    torch.cuda.synchronize()
    peer = reader.transport.connect(owner.endpoint)
    read(reader, peer, 5, extent(owner.digests, blocks), places)
    result = only(reader.wait_for(1))
    assert (result.read_id, result.status, result.message) == (5, ReadStatus.OK, "")
    assert result.nbytes == len(blocks) * LAYOUT.block_nbytes(FULL_GROUP)
    assert reader.transport.describe(peer) == "ucx/cuda_ipc"
    same(reader, SEED, list(blocks), [places[b] for b in blocks])
    others = [p for b, p in enumerate(places) if b not in blocks] + [NUM_BLOCKS]
    assert (reader.pool.region("kv")[others] == 3.0).all()
    moved, verified = (result.nbytes / seconds / 1e9 for seconds in (result.read_seconds, result.seconds))
    print(f"{moved:.0f} GB/s moved, {verified:.0f} verified")


def test_many_reads_at_once(owner: DeviceOwner, reader: DeviceEnd) -> None:
    places = torch.randperm(NUM_BLOCKS).tolist()
    peer = reader.transport.connect(owner.endpoint)
    for b in range(NUM_BLOCKS):
        read(reader, peer, b, extent(owner.digests, range(b, b + 1)), places)
    results = reader.wait_for(NUM_BLOCKS)
    assert {r.read_id for r in results if isinstance(r, ReadResult)} == set(range(NUM_BLOCKS))
    assert all(isinstance(r, ReadResult) and r.status is ReadStatus.OK for r in results)
    same(reader, SEED, list(range(NUM_BLOCKS)), places)


def test_another_digest_is_a_mismatch(owner: DeviceOwner, reader: DeviceEnd) -> None:
    of = extent(owner.digests, range(4))
    wrong = (*of.digests[:7], of.digests[7] ^ (1 << 40), *of.digests[8:])
    peer = reader.transport.connect(owner.endpoint)
    read(reader, peer, 1, msgspec.structs.replace(of, digests=wrong), list(range(NUM_BLOCKS)))
    result = only(reader.wait_for(1))
    assert result.status is ReadStatus.MISMATCH
    assert "digest 7 of" in result.message


def test_a_rank_of_two_gathers_its_half(owner: DeviceOwner, gpus: tuple[int, int]) -> None:
    """Every block has its units in two places for a reader of another tensor-parallel degree: thousands of pieces."""
    layout = msgspec.structs.replace(LAYOUT, tp_size=2, tp_rank=1)
    end = DeviceEnd(layout, torch.device("cuda", gpus[1]))
    peer = end.transport.connect(owner.endpoint)
    places = torch.randperm(NUM_BLOCKS).tolist()
    plan = plan_extent(LAYOUT, layout, extent(owner.digests), places, end.bases[FULL_GROUP], NUM_BLOCKS * BLOCK_SIZE)
    for read_id in range(3):  # the first one may come before the peer is ready
        end.transport.read(peer, read_id, plan.pieces, plan.checks)
        result = only(end.wait_for(1))
        assert (result.status, result.message) == (ReadStatus.OK, "")
    generator = torch.Generator(end.device).manual_seed(SEED)
    shape = (NUM_BLOCKS + 1, 8, 2, 8, BLOCK_SIZE, 128)
    made = torch.randn(shape, generator=generator, device=end.device, dtype=torch.float32).bfloat16()
    assert torch.equal(end.pool.region("kv")[places], made[:NUM_BLOCKS, :, :, 4:])
    moved, verified = (result.nbytes / seconds / 1e9 for seconds in (result.read_seconds, result.seconds))
    print(f"{len(plan.pieces)} pieces of {result.nbytes} bytes: {moved:.0f} GB/s moved, {verified:.0f} verified")
    end.close()


def test_a_number_changed_after_publication_is_a_mismatch(gpus: tuple[int, int], reader: DeviceEnd) -> None:
    owner = DeviceOwner(LAYOUT, gpus[0], 12)
    peer = reader.transport.connect(owner.endpoint)
    of = extent(owner.digests, range(16))
    read(reader, peer, 1, of, list(range(NUM_BLOCKS)))
    assert only(reader.wait_for(1)).status is ReadStatus.OK
    owner.call("flip", 9)
    read(reader, peer, 2, of, list(range(NUM_BLOCKS)))
    assert only(reader.wait_for(1)).status is ReadStatus.MISMATCH
    owner.stop()


def test_a_killed_owner_fails_its_reads_at_once_and_gives_its_memory_back(
    gpus: tuple[int, int], reader: DeviceEnd
) -> None:
    """A worker that takes its place on that GPU needs what it had."""
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(gpus[0])[0]
    layout = make_layout(NUM_BLOCKS * 8)
    owner = DeviceOwner(layout, gpus[0], 13)
    held = before - torch.cuda.mem_get_info(gpus[0])[0]
    peer, events, asked = reader.transport.connect(owner.endpoint), [], 0
    killed_at = math.inf
    while not any(isinstance(e, PeerDown) for e in events) and time.monotonic() < killed_at + 5:
        while asked < len(events) + 16:
            read(reader, peer, asked, extent(owner.digests), list(range(NUM_BLOCKS)))
            asked += 1
        events += reader.wait_for(1, 0.05)
        if len(events) > 4 and killed_at == math.inf:
            killed_at = time.monotonic()
            os.kill(owner.process.pid or 0, 9)
    seconds = time.monotonic() - killed_at
    assert any(isinstance(e, PeerDown) for e in events), events[-3:]
    assert seconds < 1.0
    events += reader.wait_for(asked + 1 - len(events))
    assert sorted(e.read_id for e in events if isinstance(e, ReadResult)) == list(range(asked))
    read(reader, peer, 10**6, extent(owner.digests), list(range(NUM_BLOCKS)))
    assert only(reader.wait_for(1)).status is ReadStatus.FAILED
    owner.process.join(10)
    reader.pool.region("kv").fill_(7.0)
    torch.cuda.synchronize()
    time.sleep(0.3)
    assert (reader.pool.region("kv") == 7.0).all()
    after = torch.cuda.mem_get_info(gpus[0])[0]
    print(f"down after {seconds * 1e3:.0f} ms; of {held >> 20} MiB held {(before - after) >> 20} MiB remain")
    assert before - after < held // 10  # kernels that were loaded here meanwhile


def test_a_disconnected_peer_is_fenced(owner: DeviceOwner, reader: DeviceEnd) -> None:
    peer = reader.transport.connect(owner.endpoint)
    for i in range(200):
        read(reader, peer, i, extent(owner.digests), list(range(NUM_BLOCKS)))
    reader.transport.disconnect(peer)
    results = reader.wait_for(200)
    assert len(results) == 200
    assert {r.status for r in results if isinstance(r, ReadResult)} <= {ReadStatus.OK, ReadStatus.FENCED}
    again = reader.transport.connect(owner.endpoint)
    read(reader, again, 1000, extent(owner.digests, range(2)), list(range(NUM_BLOCKS)))
    assert only(reader.wait_for(1)).status is ReadStatus.OK


def test_a_reader_at_rest_takes_no_cpu(owner: DeviceOwner, reader: DeviceEnd) -> None:
    peer = reader.transport.connect(owner.endpoint)
    read(reader, peer, 1, extent(owner.digests), list(range(NUM_BLOCKS)))
    assert only(reader.wait_for(1)).status is ReadStatus.OK
    ours, theirs = time.process_time(), owner.call("cpu")
    time.sleep(1.0)
    assert time.process_time() - ours < 0.1
    assert owner.call("cpu") - theirs < 0.1


# -- two engines --------------------------------------------------------------------------------------


def make_engine(folder: Path, role: Role, gpu: int, **options: Any) -> BuiltEngine:
    engine = {"dtype": "float32", "check_ledger": True, "kv_cache_memory_bytes": 64 << 20, "devices": (gpu,)} | options
    config = WorkerConfig(
        engine=EngineConfig(model=str(folder), device="cuda", **engine),
        handoff=HandoffConfig(transports=("ucx",), min_remote_tokens=1, require_transport="ucx/cuda_ipc"),
    )
    built = build_engine(config, role, MonotonicClock(), lambda stage, done, total: None)
    built.engine.drain()
    return built


class DevicePair(Pair):
    """A decode and a prefill engine of this process, each with a transport of its own, on one GPU: an engine computes
    on its process's.
    """

    def __init__(self, folder: Path, gpu: int, **options: Any) -> None:
        self.clock = MonotonicClock()  # type: ignore[assignment]
        self.network = MemoryNetwork(self.clock)
        self.prefill = make_engine(folder, Role.PREFILL, gpu, **options)
        self.decode = make_engine(folder, Role.DECODE, gpu, **options)
        self.answers = Answers()
        self._slots = iter(range(1, 10**6))  # type: ignore[assignment]
        self.verdicts, self.events, self.cut = [], [], False
        self.connect()
        self.until(lambda: bool(self.verdicts))
        assert self.verdicts[0].state == "ready", self.verdicts

    def until(self, done: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, "no end in time"
            self.step()

    def run(self, *answers: Answer, limit: int = 0) -> None:
        self.until(lambda: all(a.ended for a in answers))

    def close(self) -> None:
        torch.cuda.synchronize()
        self.decode.close()
        self.prefill.close()


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tiny_models.make_llama(folder, seed=1),
    "windows": lambda folder: tiny_models.make_qwen3(folder, seed=2, sliding_window=24, num_hidden_layers=4),
    "latent": lambda folder: tiny_models.make_deepseek_v3(folder, seed=3),
    "states": lambda folder: tiny_models.make_qwen3_next(folder, seed=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_computed_by_one_engine_is_continued_by_another(
    gpus: tuple[int, int], family: str, tmp_path: Path
) -> None:
    """In one chunk and in several, whole blocks and a part of one; tokens are those of transformers."""
    folder = FAMILIES[family](tmp_path / "model")
    pair = DevicePair(folder, gpus[1], max_num_batched_tokens=64)
    for prompt in prompts(5, (5, 64, 150)):
        answer = pair.submit(prompt, greedy(12))
        pair.run(answer)
        assert answer.failure is None
        assert answer.tokens[0] == reference_tokens(folder, prompt, 12)
        s = answer.stats
        assert (s.fallback, s.transport, s.transferred_tokens) == ("", "ucx/cuda_ipc", len(prompt))
        print(f"{family}, {len(prompt)} tokens: {s.transfer_bytes} bytes, exposed {s.transfer_ms:.2f} ms")
    pair.check_idle()
    pair.close()


def test_several_prompts_at_once(gpus: tuple[int, int], tmp_path: Path) -> None:
    folder = FAMILIES["llama"](tmp_path / "model")
    pair = DevicePair(folder, gpus[1], max_num_batched_tokens=128)
    asked = prompts(6, (90, 33, 200, 64, 17, 128))
    answers = [pair.submit(p, greedy(10)) for p in asked]
    pair.run(*answers)
    assert [a.tokens[0] for a in answers] == [reference_tokens(folder, p, 10) for p in asked]
    assert all(a.stats.fallback == "" for a in answers)
    pair.check_idle()
    pair.close()
