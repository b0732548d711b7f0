"""The benchmark of routing by prefix: its units, its trace, its workers and its figures."""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from port_support import free_port

from benchmarks.router import prefix
from benchmarks.router.caching_workers import LiveWorker, Row, rendered, serve_http
from benchmarks.router.trace import BLOCK, TEMPLATE, Best, Mixture, Request, token_ids, write_tokenizer
from common.text import ChatTemplate, Tokenizer

HOT = Mixture(60.0, 4.0, seed=3, hot_share=0.8)


def asked(at_s: float, *contents: str, max_tokens: int = 4) -> Request:
    roles = ("system", "user", "assistant", "user")
    return Request(at_s, tuple(zip(roles, contents, strict=False)), max_tokens)


def test_a_token_is_a_byte_for_all(tmp_path: Path) -> None:
    """What our router makes of a chat with the benchmark's tokenizer and template is what HTTP workers make of it."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for request in [*HOT.requests()[:20], asked(0.0, "".join(map(chr, range(1, 256))), "¿qué? 漢字")]:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        text = ChatTemplate(TEMPLATE).render(messages)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert list(ids) == token_ids(request.messages)
        assert len(ids) == len(text.encode())
    assert tokenizer.decode([0, 0]) == "xx"


def test_a_trace_is_seeded_and_has_its_shares() -> None:
    requests = HOT.requests()
    assert requests == Mixture(60.0, 4.0, seed=3, hot_share=0.8).requests() != Mixture(60.0, 4.0, seed=4).requests()
    systems = [request.messages[0][1] for request in requests]
    hot = max(set(systems), key=systems.count)
    assert len(hot) == HOT.hot_tokens
    assert 0.65 < systems.count(hot) / len(requests) < 0.95
    assert all(first.at_s < second.at_s < 4.0 for first, second in itertools.pairwise(requests))


def test_turns_follow_what_was_said() -> None:
    mixture = Mixture(60.0, 8.0, seed=1)
    began: dict[tuple[tuple[str, str], ...], float] = {}
    later = 0
    for request in mixture.requests():
        earlier = request.messages[:-2]
        if len(request.messages) > 2:
            assert request.at_s - began.pop(earlier) >= mixture.think_s
            assert request.messages[-2] == ("assistant", "x" * mixture.output_tokens)
            later += 1
        began[request.messages] = request.at_s
        assert len(request.messages) <= 2 * mixture.most_turns
    assert later > 100


def test_the_best_possible() -> None:
    """Whole blocks of a prompt that a request before had, as prompt or as answer, but never its last token."""
    system = "s" * (2 * BLOCK)
    first, second = asked(0.0, system, "a" * BLOCK), asked(1.0, system, "b")
    follow = Request(2.0, (*first.messages, ("assistant", "xxxx"), ("user", "c" * 100)), 4)
    requests = [first, second, follow, follow]
    lengths = [len(token_ids(request.messages)) for request in requests]
    head = len("[system]\n")
    shared = (head + 2 * BLOCK) // BLOCK * BLOCK
    had = (lengths[0] + 3) // BLOCK * BLOCK
    again = (lengths[3] - 1) // BLOCK * BLOCK
    assert Best.of(requests) == Best(sum(lengths), shared + had + again)
    assert Best.of([]).hit_rate == 0.0


def test_figures_are_of_the_books() -> None:
    books = [
        {"requests": 3, "prompt_tokens": 300, "cached_tokens": 100, "busy_s": 1.0, "waited_s": 0.6, "lost_s": 0.0},
        {"requests": 1, "prompt_tokens": 100, "cached_tokens": 100, "busy_s": 1.0, "waited_s": 0.3, "lost_s": 0.25},
    ]
    answers = [prefix.Answer(0.1, 4), prefix.Answer(0.3, 4), prefix.Answer(0.2, 4), prefix.Answer(0.4, 4)]
    found = prefix.figures(books, answers, Best(400, 250))
    assert (found["hit_rate"], found["of_best"]) == (0.5, 0.8)
    assert (found["computed_spread"], found["request_spread"], found["busy_spread"]) == (2.0, 1.5, 1.0)
    assert (found["first_p50_ms"], found["workers_lost_s"], found["failed"]) == (pytest.approx(300), 0.25, 0)
    assert (found["first_mean_ms"], found["first_mean_at_worker_ms"]) == (pytest.approx(250), pytest.approx(225))
    with pytest.raises(SystemExit, match="400 prompt tokens"):
        prefix.figures(books, answers, Best(401, 250))
    assert prefix.figures(books, [*answers, prefix.Answer(None, 0)], Best(401, 250))["failed"] == 1


async def test_a_worker_keeps_what_it_had(tmp_path: Path) -> None:
    rows: list[Row] = []
    over = asyncio.Event()

    def tell(found: list[Row]) -> None:
        rows.extend(found)
        if any(row.ended for row in found):
            over.set()

    worker = LiveWorker(1, 1, tmp_path, tell)
    first = asked(0.0, "s" * 300, "a")
    follow = Request(1.0, (*first.messages, ("assistant", "xxxx"), ("user", "b" * 40)), 4)
    for request in (first, follow):
        over.clear()
        worker.submit(token_ids(request.messages), request.max_tokens)
        await asyncio.wait_for(over.wait(), 10)
    best = Best.of([first, follow])
    assert (worker.prompt_tokens, worker.cached_tokens) == (best.prompt_tokens, best.cached_tokens)
    assert [(row.position, row.ended) for row in rows] == 2 * [(0, False), (1, False), (2, False), (3, True)]
    assert [row.stats.computed_tokens for row in rows if row.stats] == [
        len(token_ids(first.messages)),
        len(token_ids(follow.messages)) - best.cached_tokens,
    ]
    assert worker.machine.feed.seq > 0


async def test_the_client_and_http_workers(tmp_path: Path) -> None:
    """Requests at their times over real sockets; a worker that is asked for tokens has them, too."""
    requests = Mixture(30.0, 0.5, seed=2).requests()
    port = free_port()
    async with AsyncExitStack() as servers:
        (worker,) = await serve_http(tmp_path, [port], [], servers)
        answers = await prefix.play(port, requests)
    assert [answer.tokens for answer in answers] == [24] * len(requests)
    found = prefix.figures([worker.books], answers, Best.of(requests))
    assert found["failed"] == 0
    assert found["first_p50_ms"] > 20.0
    assert str(token_ids(requests[0].messages)).replace(" ", "").encode() in rendered(requests[0].body)


async def test_events_as_vllm_publishes_them(tmp_path: Path) -> None:
    """A subscriber that speaks ZMTP 3.1 gets all blocks, with their tokens, in messages of three parts."""
    request, (port, events_port) = asked(0.0, "s" * 300, "a", max_tokens=BLOCK), (free_port(), free_port())
    async with AsyncExitStack() as servers:
        (worker,) = await serve_http(tmp_path, [port], [events_port], servers)
        reader, writer = await asyncio.open_connection("127.0.0.1", events_port)
        writer.write(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
        writer.write(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB")
        assert (await reader.readexactly(64))[:11] == b"\xff" + bytes(8) + b"\x7f\x03"
        assert (await reader.readexactly(27)).endswith(b"PUB")
        (answer,) = await prefix.play(port, [request])
        stored: list[int] = []
        parents: list[int | None] = []
        ids = [*token_ids(request.messages), *([0] * BLOCK)]
        expected = ids[: (len(ids) - 1) // BLOCK * BLOCK]
        for number in range(len(expected)):
            topic, seq, payload = [await frame(reader) for _ in range(3)]
            assert (topic, seq) == ((True, b""), (True, number.to_bytes(8, "big")))
            assert not payload[0]
            for event in msgspec.msgpack.decode(payload[1])[1]:
                assert (event["type"], event["block_size"]) == ("BlockStored", BLOCK)
                assert event["parent_block_hash"] == (parents[-1] if parents else None)
                parents += event["block_hashes"]
                stored += event["token_ids"]
            if len(stored) >= len(expected):
                break
        assert stored == expected
        writer.close()
        await writer.wait_closed()
        assert worker.publisher is not None
        for _ in range(1000):
            if not worker.publisher.num_subscribers:
                break
            await asyncio.sleep(0.01)
    assert answer.tokens == BLOCK


async def frame(reader: asyncio.StreamReader) -> tuple[bool, bytes]:
    """(more follow, body)"""
    flags = (await asyncio.wait_for(reader.readexactly(1), 10))[0]
    size = int.from_bytes(await reader.readexactly(8 if flags & 2 else 1), "big")
    return bool(flags & 1), await reader.readexactly(size)


def test_our_router_plays_a_trace(tmp_path: Path) -> None:
    """The real router over gRPC, fed with the workers' KV events."""
    requests = Mixture(20.0, 1.5, seed=5, hot_share=0.8).requests()
    core = min(os.sched_getaffinity(0))
    found = prefix.Played(requests, core, core, tmp_path).through(prefix.Contender("nanodeploy", "cost"))
    assert found["failed"] == 0
    assert found["tokens"] == 24 * len(requests)
    assert 0.3 < found["of_best"] <= 1.0
