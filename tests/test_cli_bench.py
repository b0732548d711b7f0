from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_support import console
from typer.testing import CliRunner

from common.errors import NanoDeployError
from services.cli.bench.client import BenchClient
from services.cli.bench.command import run_bench
from services.cli.bench.load import LoadOptions, make_bodies, run_load
from services.cli.bench.stats import Sample, distribution_ms, percentile, summarise, table
from services.cli.main import app

Answer = Callable[[str, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A real HTTP server on a free port: its URL, and the bodies it got."""
    bodies: list[dict[str, Any]] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                bodies.append(body)
                await answer(head.split(" ")[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", bodies
    finally:
        listening.close()
        await asyncio.gather(*tasks)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


async def three_tokens(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    if path == "/tokenize":
        data = json.dumps({"tokens": [5, 9, 5, 11]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
        return
    writer.write(HEAD)
    if "messages" in body:
        writer.write(chunk(event({"choices": [{"delta": {"role": "assistant"}}]})))
    for text in ("a", "b", "c"):
        await asyncio.sleep(0.02)
        piece = {"delta": {"content": text}} if "messages" in body else {"text": text}
        data = event({"choices": [piece]})
        writer.write(chunk(data[:9]))  # events may be cut anywhere
        await writer.drain()
        writer.write(chunk(data[9:]))
    writer.write(chunk(event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


def options(**fields: Any) -> LoadOptions:
    defaults = {"num_prompts": 6, "concurrency": 2, "request_rate": 0.0, "input_len": 10, "output_len": 3}
    return LoadOptions(model="m", **{**defaults, **fields})


@pytest.mark.parametrize("chat", [False, True])
async def test_times_and_counts_of_a_stream(chat: bool) -> None:
    async with server(three_tokens) as (url, _):
        client = BenchClient(url)
        body = make_bodies(options(chat=chat), [])[0]
        sample = await client.stream("/v1/chat/completions" if chat else "/v1/completions", body, 5.0)
        client.close()
    assert sample.error == ""
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (7, 4, 3)
    assert len(sample.arrivals_s) == 3  # the role alone is no token
    assert sample.arrivals_s[0] - sample.started_s >= 0.02
    assert all(b - a >= 0.015 for a, b in zip(sample.arrivals_s, sample.arrivals_s[1:], strict=False))


async def test_connections_are_kept_and_failures_counted() -> None:
    peers: set[int] = set()

    async def answer(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername")[1])
        match body["seed"]:
            case 1:
                writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")
            case 2:
                writer.write(HEAD + chunk(event({"choices": [{"text": "x"}]})))
                await writer.drain()
                writer.close()
            case 3:
                writer.write(HEAD + chunk(event({"error": {"message": "engine died"}})) + b"0\r\n\r\n")
            case 4:
                await asyncio.sleep(1)
            case _:
                await three_tokens(path, body, writer)

    async with server(answer) as (url, _):
        client = BenchClient(url)
        samples = [await client.stream("/v1/completions", {"seed": seed}, 0.5) for seed in (0, 0, 1, 0, 2, 3, 4)]
        client.close()
    assert len(peers) == 2  # anew only after the broken one
    assert [s.error for s in samples[:2]] == ["", ""]
    assert samples[2].error == "HTTP 429: busy"
    assert "closed in mid-answer" in samples[4].error
    assert "engine died" in samples[5].error
    assert samples[6].error == "no end after 0 s"
    summary = summarise(samples, 1.0)
    assert (summary["completed"], summary["failed"]) == (3, 4)
    assert summary["completion_tokens"] == 9


async def test_no_server_is_a_counted_failure() -> None:
    async with server(three_tokens) as (url, _):
        pass
    sample = await BenchClient(url).stream("/v1/completions", {}, 1.0)
    assert "ConnectionRefusedError" in sample.error


async def test_closed_loop_keeps_its_concurrency() -> None:
    running = highest = 0

    async def answer(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal running, highest
        running += 1
        highest = max(highest, running)
        await three_tokens(path, body, writer)
        running -= 1

    done: list[int] = []
    async with server(answer) as (url, bodies):
        client = BenchClient(url)
        load = options(num_prompts=9, concurrency=3)
        samples, duration_s = await run_load(client, load, make_bodies(load, [1, 2]), lambda: done.append(1))
        client.close()
    assert (highest, len(samples), len(done), len(bodies)) == (3, 9, 9, 9)
    assert duration_s >= 3 * 0.06


async def test_poisson_arrivals_do_not_wait_for_answers() -> None:
    async def slow(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await three_tokens(path, body, writer)

    async with server(slow) as (url, _):
        client = BenchClient(url)
        load = options(num_prompts=20, request_rate=200.0)
        samples, duration_s = await run_load(client, load, make_bodies(load, []), lambda: None)
        client.close()
    starts = [s.started_s - samples[0].started_s for s in samples]
    assert starts == sorted(starts)
    assert starts[-1] < 0.3  # 20 arrivals at 200/s take about 0.1 s, in turn they would take 7
    assert duration_s < 3


def test_prompts_are_reproducible_and_exact() -> None:
    load = options(shared_prefix_len=4)
    bodies = make_bodies(load, [1, 2, 3])
    assert bodies == make_bodies(load, [1, 2, 3])
    assert bodies != make_bodies(options(shared_prefix_len=4, seed=1), [1, 2, 3])
    assert all(len(b["prompt"]) == 10 and set(b["prompt"]) <= {1, 2, 3} for b in bodies)
    assert len({tuple(b["prompt"][:4]) for b in bodies}) == 1
    assert len({tuple(b["prompt"][4:]) for b in bodies}) > 1
    assert all(len(b["prompt"].split()) == 10 for b in make_bodies(load, []))


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0
    assert percentile(list(range(101)), 95) == 95
    assert distribution_ms([]) == {}
    values = distribution_ms([0.001, 0.003])
    assert (values["mean"], values["p50"], values["max"]) == (2.0, 2.0, 3.0)


def test_summary_of_known_samples() -> None:
    one = Sample(0.0, [0.1, 0.2, 0.4], prompt_tokens=5, completion_tokens=4)
    two = Sample(0.0, [0.3], prompt_tokens=5, completion_tokens=1)
    summary = summarise([one, two, Sample(0.0, error="x"), Sample(0.0)], 2.0)
    assert summary["errors"] == {"x": 1, "no text came": 1}
    assert summary["output_tokens_per_s"] == 2.5
    assert summary["ttft_ms"]["max"] == 300.0
    assert summary["tpot_ms"]["p50"] == 100.0
    assert summary["gap_ms"]["max"] == 200.0
    shown, out = console()
    shown.print(table(summary))
    assert "time to first token" in out.getvalue()
    assert "1 x no text came" in out.getvalue()


async def test_command_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    shown, out = console()
    async with server(three_tokens) as (url, bodies):
        code = await asyncio.to_thread(run_bench, url, options(), 1, "", str(target), shown)
    assert code == 0
    result = json.loads(target.read_text())
    assert (result["completed"], result["completion_tokens"], result["load"]["input_len"]) == (6, 18, 10)
    generations = [b for b in bodies if "max_tokens" in b]
    assert len(generations) == 7  # one warm-up
    assert set(generations[1]["prompt"]) <= {5, 9, 11}  # of the server's own vocabulary
    assert "Written to" in out.getvalue()
    assert "Seed 0" in out.getvalue()
    assert "The prefix cache had 24 of the 42 prompt tokens" in out.getvalue()


async def test_when_all_fail_the_reason_is_said_plainly() -> None:
    async def refuse(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        data = json.dumps({"error": {"message": "the prompt is too long " * 20, "type": "x"}}).encode()
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))

    shown, out = console()
    async with server(refuse) as (url, _):
        with pytest.raises(NanoDeployError) as caught:
            await asyncio.to_thread(run_bench, url, options(), 0, "", "", shown)
    assert caught.value.message == "all 6 requests failed: HTTP 400: " + "the prompt is too long " * 20
    assert out.getvalue() == ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadOptions]:
    """The load that flags of the command ask for."""
    loads: list[LoadOptions] = []

    def note(url: str, load: LoadOptions, *rest: Any) -> int:
        loads.append(load)
        return 0

    def ask(*flags: str) -> LoadOptions:
        CliRunner().invoke(app, ["bench", "--url", "127.0.0.1:1/v1", "--model", "m", *flags], catch_exceptions=False)
        return loads[-1]

    monkeypatch.setattr("services.cli.bench.command.run_bench", note)
    return ask


async def test_another_seed_each_time(asked: Callable[..., LoadOptions]) -> None:
    seeds = [asked(*flags).seed for flags in ([], [], ["--seed", "5"])]
    assert len(set(seeds)) == 3
    assert seeds[2] == 5


async def test_concurrency_by_both_spellings(asked: Callable[..., LoadOptions]) -> None:
    spellings = ([], ["--concurrency", "3"], ["--max-concurrency", "5"])
    assert [asked(*flags).concurrency for flags in spellings] == [8, 3, 5]
