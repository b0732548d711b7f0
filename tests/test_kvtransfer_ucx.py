"""The UCX transport between real processes: data, digests, waking up, cost at rest, leaving."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from ucx_support import (
    BLOCK,
    LANES,
    MIB,
    NUM_BLOCKS,
    SHAPE_LPUTB,
    Owner,
    allocate,
    block_of,
    checks_of_block,
    make_transport,
    only,
    owner,
    piece,
    random_bytes,
    running,
    transport,
    wait_for,
)

from common.kvcache.digest import digest_reference
from common.kvtransfer.transport import DigestCheck, ReadResult, ReadStatus
from common.kvtransfer.ucx import UcxTransport

__all__ = ["owner", "transport"]


def tcp_segments_sent() -> int:
    """By everybody in this network namespace, since it was made; loopback's segments hold up to 64 KiB."""
    names, counts = (
        line.split() for line in Path("/proc/net/snmp").read_text(encoding="ascii").splitlines() if line[:4] == "Tcp:"
    )
    return int(counts[names.index("OutSegs")])


def segments_of_reads(transport: UcxTransport, owner: Owner, times: int) -> list[int]:
    """TCP segments that were sent while all of `owner`'s group `full` was read, read by read."""
    nbytes = owner.memory["full"].size
    local = allocate(transport, "full", nbytes)
    peer = transport.connect(owner.endpoint)
    counts = []
    for read_id in range(times + 1):  # the first one meets cold memory and narrow windows
        local[:] = 0
        before = tcp_segments_sent()
        transport.read(peer, read_id, [piece(local, "full", 0, 0, nbytes)], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        counts.append(tcp_segments_sent() - before)
    np.testing.assert_array_equal(local, owner.memory["full"])
    return counts[1:]


# -- data --------------------------------------------------------------------------------------------


def test_many_pieces_land_where_they_should(owner: Owner, transport: UcxTransport) -> None:
    rng = np.random.default_rng()
    local = allocate(transport, "full", 4 * MIB)
    assert local.ctypes.data % 64 == 0
    assert not local.any()
    expected = np.zeros_like(local)
    pieces, cursor = [], 0
    for nbytes in rng.integers(1, 6000, 700):
        cursor += int(rng.integers(0, 50))
        group = "full" if rng.random() < 0.8 else "tail"
        nbytes = min(int(nbytes), 500) if group == "tail" else int(nbytes)
        remote = int(rng.integers(0, owner.memory[group].size - nbytes))
        pieces.append(piece(local, group, remote, cursor, nbytes))
        expected[cursor : cursor + nbytes] = owner.memory[group][remote : remote + nbytes]
        cursor += nbytes
    rng.shuffle(pieces)
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 77, pieces, [])
    result = only(wait_for(transport, 1))
    assert (result.read_id, result.status, result.message) == (77, ReadStatus.OK, "")
    assert result.nbytes == sum(p.nbytes for p in pieces)
    assert 0 < result.read_seconds <= result.seconds < 20
    np.testing.assert_array_equal(local, expected)


def test_blocks_verify_in_parallel_reads(owner: Owner, transport: UcxTransport) -> None:
    """Every block is a read of its own into another block's place, each with its digests; the last ones are partial."""
    local = allocate(transport, "full", NUM_BLOCKS * BLOCK)
    peer = transport.connect(owner.endpoint)
    places = np.random.default_rng().permutation(NUM_BLOCKS)
    for source, place in enumerate(places):
        checks = checks_of_block(
            block_of(owner, source), local.ctypes.data + int(place) * BLOCK, 16 * source, 16 - source % 3
        )
        transport.read(peer, source, [piece(local, "full", source * BLOCK, int(place) * BLOCK, BLOCK)], checks)
    results = wait_for(transport, NUM_BLOCKS)
    assert {r.read_id for r in results if isinstance(r, ReadResult)} == set(range(NUM_BLOCKS))
    assert all(isinstance(r, ReadResult) and r.status is ReadStatus.OK for r in results)
    expected = owner.memory["full"].reshape(NUM_BLOCKS, BLOCK)
    np.testing.assert_array_equal(local.reshape(NUM_BLOCKS, BLOCK)[places], expected)


def test_strided_pieces_take_one_unit_and_sum_over_blocks(owner: Owner, transport: UcxTransport) -> None:
    """Unit 2 of three blocks of 16 tokens becomes one block of 48 tokens; the owner's three digests add up."""
    layers, parts, units, tokens, nbytes = SHAPE_LPUTB
    run = tokens * nbytes
    local = allocate(transport, "one unit", layers * parts * 3 * run)
    pieces, expected = [], 0
    for b in range(3):
        source = block_of(owner, b).reshape(SHAPE_LPUTB)[:, :, 2]
        expected += digest_reference(np.ascontiguousarray(source).view(np.uint64), 100 + 16 * b)
        for lp in range(layers * parts):
            remote = b * BLOCK + (lp * units + 2) * run
            pieces.append(piece(local, "full", remote, (lp * 3 + b) * run, run))
    segments = tuple((local.ctypes.data + b * run, 100 + 16 * b, tokens) for b in range(3))
    check = DigestCheck(segments, layers, parts, parts * 3 * run, 3 * run, nbytes, nbytes, expected % 2**64)
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, pieces, [check])
    transport.read(peer, 2, pieces, [check, msgspec.structs.replace(check, expected=(expected + 1) % 2**64)])
    first, second = wait_for(transport, 2)
    assert isinstance(first, ReadResult)
    assert isinstance(second, ReadResult)
    assert (first.read_id, first.status) == (1, ReadStatus.OK)
    assert (second.read_id, second.status) == (2, ReadStatus.MISMATCH)
    assert "digest 1 of 2" in second.message


@pytest.mark.parametrize("row_nbytes", [8, 12, 72, 96, 256, 512, 1152, 16 * 1024 + 64])
def test_rows_of_any_width_are_copied_whole_and_verified(
    owner: Owner, transport: UcxTransport, row_nbytes: int
) -> None:
    """Two regions and padding in a block, at odd places: what no digest covers is copied as well."""
    rng = np.random.default_rng()
    layers, parts, units, tokens = 2, 2, 3, 5
    wide = layers * parts * units * tokens * row_nbytes
    narrow = layers * tokens * 8
    begin = int(rng.integers(0, 2000))
    total = begin + wide + 40 + narrow + 1000
    target = int(rng.integers(0, 64)) if rng.random() < 0.5 else -begin % 32
    local = allocate(transport, "full", target + total)
    valid = int(rng.integers(1, tokens + 1))
    source, base = owner.memory["full"][:total], local.ctypes.data + target + begin
    run = tokens * row_nbytes
    checks = []
    for u in range(units):
        rows = source[begin : begin + wide].reshape(layers, parts, units, tokens, row_nbytes)[:, :, u, :valid]
        padded = np.ascontiguousarray(np.pad(rows, [(0, 0)] * 3 + [(0, -row_nbytes % 8)])).view(np.uint64)
        strides = (parts * units * run, units * run, row_nbytes)
        segments = ((base + u * run, 7, valid),)
        checks.append(DigestCheck(segments, layers, parts, *strides, row_nbytes, digest_reference(padded, 7)))
    at = begin + wide + 40
    scales = np.ascontiguousarray(source[at : at + narrow].reshape(layers, 1, tokens, 8)[:, :, :valid]).view(np.uint64)
    segments = ((base + wide + 40, 7, valid),)
    checks.append(DigestCheck(segments, layers, 1, tokens * 8, tokens * 8, 8, 8, digest_reference(scales, 7)))
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, [piece(local, "full", 0, target, total)], checks)
    result = only(wait_for(transport, 1))
    assert (result.status, result.message) == (ReadStatus.OK, "")
    np.testing.assert_array_equal(local[target:], source)
    for i, check in enumerate(checks):
        wrong = [*checks[:i], msgspec.structs.replace(check, expected=check.expected ^ 1), *checks[i + 1 :]]
        transport.read(peer, 2, [piece(local, "full", 0, target, total)], wrong)
        assert only(wait_for(transport, 1)).status is ReadStatus.MISMATCH


@pytest.mark.parametrize("lane", LANES)
def test_a_byte_changed_after_publication_is_a_mismatch(lane: str) -> None:
    transport = make_transport(lane)
    with running(lane, {"full": 8 * BLOCK}) as owner:
        local = allocate(transport, "full", 8 * BLOCK)
        checks = [
            check
            for b in range(8)
            for check in checks_of_block(
                owner.memory["full"][b * BLOCK : (b + 1) * BLOCK], local.ctypes.data + b * BLOCK, 16 * b
            )
        ]
        pieces = [piece(local, "full", 0, 0, 8 * BLOCK)]
        peer = transport.connect(owner.endpoint)
        transport.read(peer, 1, pieces, checks)
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        owner.call("flip", "full", int(np.random.default_rng().integers(0, 8 * BLOCK)))
        transport.read(peer, 2, pieces, checks)
        assert only(wait_for(transport, 1)).status is ReadStatus.MISMATCH
    transport.close()


def test_a_read_without_pieces_or_checks_ends(owner: Owner, transport: UcxTransport) -> None:
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 5, [], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.OK


def test_the_lane_is_named(owner: Owner, transport: UcxTransport, request: pytest.FixtureRequest) -> None:
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, [], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.OK
    assert transport.describe(peer) == f"ucx/{request.node.callspec.params['owner']}"
    assert transport.describe(12345) == "ucx/gone"


def test_two_processes_read_from_one_another(owner: Owner, transport: UcxTransport) -> None:
    mine = allocate(transport, "mine", 3 * MIB)
    mine[:] = random_bytes(4, mine.size)
    inbox = allocate(transport, "inbox", owner.memory["full"].size)
    peer = transport.connect(owner.endpoint)
    transport.read(peer, 1, [piece(inbox, "full", 0, 0, inbox.size)], [])
    events, seen = owner.call("read", transport.endpoint(), "mine", mine.size)
    assert only(events).status is ReadStatus.OK
    assert seen == mine.tobytes()
    assert only(wait_for(transport, 1)).status is ReadStatus.OK
    np.testing.assert_array_equal(inbox, owner.memory["full"])


def test_a_small_read_is_not_stuck_behind_a_large_one(owner: Owner, transport: UcxTransport) -> None:
    size = owner.memory["full"].size
    local = allocate(transport, "full", size + 4096)
    peer = transport.connect(owner.endpoint)
    large = [piece(local, "full", 0, 0, size)]
    for i in range(60):
        transport.read(peer, i, large, [])
    transport.read(peer, 999, [piece(local, "tail", 0, size, 1000)], [])
    order = [e.read_id for e in wait_for(transport, 61) if isinstance(e, ReadResult)]
    assert len(order) == 61
    assert order.index(999) < 30


def test_memory_of_the_caller_is_registered_with_a_guard_behind_it(transport: UcxTransport) -> None:
    """What lies between the memory and its guard is no peer's business, and no cookie is written there."""
    nbytes, gap, guard_nbytes = 3 * BLOCK, 5000, 4096
    memory = random_bytes(8, nbytes + gap + guard_nbytes)
    before, base = memory.copy(), memory.ctypes.data
    local = allocate(transport, "full", nbytes)
    with closing(make_transport("cma")) as owner:
        owner.register("full", base, nbytes, base + nbytes + gap, guard_nbytes)
        np.testing.assert_array_equal(memory[: nbytes + gap], before[: nbytes + gap])
        (handle,) = owner.endpoint().memory
        assert (handle.base, handle.nbytes) == (base, nbytes)
        peer = transport.connect(owner.endpoint())
        transport.read(peer, 1, [piece(local, "full", 0, 0, nbytes)], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.OK
        np.testing.assert_array_equal(local, memory[:nbytes])
        transport.read(peer, 2, [piece(local, "full", nbytes - 8, 0, 16)], [])
        assert only(wait_for(transport, 1)).status is ReadStatus.FAILED
        with pytest.raises(ValueError, match="allocated already"):
            owner.register("full", base, nbytes, base + nbytes, guard_nbytes)
        with pytest.raises(ValueError, match="guard"):
            owner.register("other", base, nbytes, base + nbytes - 1, guard_nbytes)
        transport.disconnect(peer)


# -- waking up, resting, leaving ----------------------------------------------------------------------


def test_the_descriptor_is_readable_exactly_while_there_is_something(owner: Owner, transport: UcxTransport) -> None:
    poller = select.poll()
    poller.register(transport.wakeup_fd, select.POLLIN)
    assert poller.poll(0) == []
    assert transport.poll() == []
    peer = transport.connect(owner.endpoint)
    for i in range(150):
        transport.read(peer, i, [], [])
    seen: list[int] = []
    while len(seen) < 150:
        assert poller.poll(5000) == [(transport.wakeup_fd, select.POLLIN)]
        seen += [e.read_id for e in transport.poll() if isinstance(e, ReadResult)]
    assert seen == list(range(150))
    assert poller.poll(50) == []
    transport.read(999, 1, [], [])
    assert poller.poll(5000) != []
    assert only(transport.poll()).status is ReadStatus.FAILED
    assert poller.poll(50) == []


def test_rest_costs_nothing(owner: Owner, transport: UcxTransport) -> None:
    peer = transport.connect(owner.endpoint)
    local = allocate(transport, "full", owner.memory["full"].size)
    transport.read(peer, 1, [piece(local, "full", 0, 0, local.size)], [])
    assert only(wait_for(transport, 1)).status is ReadStatus.OK
    time.sleep(0.1)
    before, theirs = time.process_time(), owner.call("cpu")
    time.sleep(2)
    assert time.process_time() - before < 0.02
    assert owner.call("cpu") - theirs < 0.02


@pytest.mark.soak  # beside other work the kernel joins small segments: a quiet machine is needed to tell them apart
def test_tcp_moves_large_segments_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX's own 8 KiB segments, asked for by its variables, fill no packet: a read takes several times as many.

    The kernel joins some of the small ones when the reader is slow, and other tests send beside us, so the read
    that took the least stands for ours, the one that took the most for UCX's.
    """
    sent = {}
    for kind in ("ours", "ucx"):
        if kind == "ucx":
            monkeypatch.setenv("UCX_TCP_TX_SEG_SIZE", "8k")
            monkeypatch.setenv("UCX_TCP_RX_SEG_SIZE", "64k")
        with running("tcp", {"full": 24 * MIB}) as owner, closing(make_transport("tcp")) as transport:
            sent[kind] = segments_of_reads(transport, owner, 12)
    assert 2 * min(sent["ours"]) < max(sent["ucx"]), sent


def num_sockets(pid: int | str) -> int:
    """Open ones of a process."""
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(fd).startswith("socket:")
    return count


def test_sockets_of_closed_endpoints_are_closed_at_the_next_look_for_dead_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """UCX has an endpoint on both sides, and tells the other one of a close only when that asks: over TCP alone the
    socket stays until then.
    """
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "500ms")
    with running("tcp", {"full": MIB}) as owner, closing(make_transport("tcp")) as transport:
        local, pid = allocate(transport, "full", MIB), owner.process.pid
        assert pid is not None
        before = num_sockets("self"), num_sockets(pid)
        for read_id in range(12):
            peer = transport.connect(owner.endpoint)
            transport.read(peer, read_id, [piece(local, "full", 0, 0, MIB)], [])
            assert only(wait_for(transport, 1)).status is ReadStatus.OK
            transport.disconnect(peer)
        deadline = time.monotonic() + 20
        while (num_sockets("self"), num_sockets(pid)) > before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert num_sockets(pid) == before[1]


def test_a_closed_transport_says_so(owner: Owner, transport: UcxTransport) -> None:
    peer = transport.connect(owner.endpoint)
    transport.close()
    transport.close()
    assert transport.poll() == []
    with pytest.raises(ValueError, match="closed"):
        transport.read(peer, 1, [], [])


def test_leaving_without_close_is_clean() -> None:
    program = (
        "from common.config.schema import UcxConfig; from common.kvtransfer.ucx import UcxTransport\n"
        "a, b = (UcxTransport(UcxConfig(net_devices='lo')) for _ in range(2))\n"
        "a.allocate('full', 1 << 20); b.connect(a.endpoint())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
