from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest

from common.config.schema import LogConfig
from common.rpc.context import call_context
from common.telemetry import Metrics, configure_logging, get_logger, log_context, new_trace, parse_traceparent
from common.telemetry.logs import LINES_KEPT, LINES_WAIT_S, bound_fields, log_as_library


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    log_as_library()


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_as_a_library_only_warnings_go_out_and_never_to_stdout() -> None:
    code = (
        "from common.telemetry import get_logger; log = get_logger('a.b');"
        "log.info('quiet', n=1); log.warning('heard', n=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "event='heard' n=2\n"


@pytest.mark.usefixtures("restored_logging")
def test_json_lines_carry_service_and_context() -> None:
    out = io.StringIO()
    early = get_logger("made.before.configure")
    configure_logging(LogConfig(), "router", out)
    with log_context(request_id="r1", trace_id="t1"):
        get_logger("a.b").info("admitted", tokens=3)
        logging.getLogger("uvicorn.error").warning("from %s", "stdlib")
    early.error("late")
    first, second, third = lines(out)
    assert first["event"] == "admitted"
    assert (first["service"], first["level"], first["logger"]) == ("router", "info", "a.b")
    assert (first["request_id"], first["trace_id"], first["tokens"]) == ("r1", "t1", 3)
    assert (second["event"], second["request_id"], second["service"]) == ("from stdlib", "r1", "router")
    assert third["event"] == "late"
    assert "request_id" not in third


@pytest.mark.usefixtures("restored_logging")
def test_level_exceptions_and_odd_values() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(level="warning"), "x", out)
    get_logger("a").info("hidden")
    logging.getLogger("a").info("hidden")
    try:
        raise ValueError("boom")
    except ValueError:
        get_logger("a").exception("failed", value={1: object, "b": b"\xff"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    failed, warned = lines(out)
    assert "ValueError: boom" in str(failed["exception"])
    assert "careful" in str(warned["event"])


@pytest.mark.usefixtures("restored_logging")
def test_console_format_is_for_people() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(format="console"), "x", out)
    get_logger("a").info("hello", n=1)
    assert "hello" in out.getvalue()
    assert not out.getvalue().startswith("{")


@pytest.mark.usefixtures("restored_logging")
async def test_context_belongs_to_its_task() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(), "x", out)

    async def one(name: str) -> None:
        with log_context(request_id=name):
            await asyncio.sleep(0)
            get_logger("a").info(name)

    await asyncio.gather(*(one(f"r{i}") for i in range(8)))
    await asyncio.sleep(2 * LINES_WAIT_S)
    assert all(line["event"] == line["request_id"] for line in lines(out))
    assert len(lines(out)) == 8


@pytest.mark.usefixtures("restored_logging")
async def test_lines_on_a_loop_leave_together_but_warnings_at_once_and_in_order() -> None:
    out = io.StringIO()
    configure_logging(LogConfig(), "x", out)
    log = get_logger("a")
    log.info("one")
    log.info("two")
    assert not out.getvalue()
    log.warning("three")
    assert [line["event"] for line in lines(out)] == ["one", "two", "three"]
    log.info("four")
    logging.getLogger("b").info("five")
    assert [line["event"] for line in lines(out)][3:] == ["four", "five"]
    for i in range(LINES_KEPT):
        log.info(str(i))
    assert len(lines(out)) == 5 + LINES_KEPT
    log.info("last")
    await asyncio.sleep(3 * LINES_WAIT_S)
    assert lines(out)[-1]["event"] == "last"


@pytest.mark.usefixtures("restored_logging")
async def test_a_log_that_nobody_reads_any_more_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    failed: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failed.append(what))
    configure_logging(LogConfig(), "x", Gone())
    log = get_logger("a")
    log.info("kept")
    logging.getLogger("b").warning("of a library")
    for _ in range(LINES_KEPT + 1):
        log.info("kept")
    log.warning("at once")
    log.info("by the timer")
    await asyncio.sleep(2 * LINES_WAIT_S)
    assert not failed


def test_what_was_kept_is_written_when_the_process_ends() -> None:
    code = (
        "import asyncio\n"
        "from common.config.schema import LogConfig\n"
        "from common.telemetry import configure_logging, get_logger\n"
        "configure_logging(LogConfig(), 'x')\n"
        "async def main():\n"
        "    get_logger('a').info('kept')\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["event"] == "kept"


async def test_a_context_closed_by_another_task_takes_nothing_there() -> None:
    """A stream that is given up is closed wherever its generator is found: gRPC does it in a task of its own."""
    trace = new_trace(Random(1)).traceparent

    async def stream() -> AsyncIterator[int]:
        with call_context("r1", trace):
            yield 1

    given_up = stream()
    await asyncio.create_task(anext(given_up), context=contextvars.copy_context())

    async def other() -> None:
        with log_context(request_id="other"):
            await given_up.aclose()
            assert bound_fields() == {"request_id": "other"}

    await asyncio.create_task(other())


def test_traceparent_round_trip_and_child() -> None:
    random = Random(1)
    trace = new_trace(random, sampled=True)
    assert parse_traceparent(trace.traceparent) == trace
    child = trace.child(random)
    assert (child.trace_id, child.sampled) == (trace.trace_id, True)
    assert child.span_id != trace.span_id
    known = parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert known is not None
    assert known.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert parse_traceparent("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-later") is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
    ],
)
def test_bad_traceparent_is_none(header: str) -> None:
    assert parse_traceparent(header) is None


def test_metrics_render_with_our_prefix() -> None:
    metrics = Metrics()
    metrics.counter("prompt_tokens", "Prompt tokens.", ["model"]).labels("m").inc(5)
    assert metrics.counter("prompt_tokens", "Prompt tokens.", ["model"]).labels("m") is not None
    metrics.gauge("num_requests_running", "Running.").set(2)
    metrics.histogram("time_to_first_token_seconds", "TTFT.").observe(0.2)
    text = metrics.render().decode()
    assert 'nanodeploy:prompt_tokens_total{model="m"} 5.0' in text
    assert "nanodeploy:num_requests_running 2.0" in text
    assert 'nanodeploy:time_to_first_token_seconds_bucket{le="0.3"} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_engine_counts_are_taken_over() -> None:
    metrics = Metrics(with_process=False)
    metrics.apply_engine(
        [("num_preemptions_total", 3.0), ("leases_active", 2.0)], [("request_queue_time_seconds", (0.01, 0.2))]
    )
    by_pos = ("accepted_per_pos_total", "position", (("0", 5.0), ("1", 2.0)))
    metrics.apply_engine([("num_preemptions_total", 4.0)], [("request_queue_time_seconds", (0.3,))], [by_pos])
    text = metrics.render().decode()
    assert "# TYPE nanodeploy:num_preemptions_total counter\nnanodeploy:num_preemptions_total 4.0" in text
    assert "# TYPE nanodeploy:leases_active gauge\nnanodeploy:leases_active 2.0" in text
    assert "nanodeploy:request_queue_time_seconds_count 3.0" in text
    assert "# TYPE nanodeploy:accepted_per_pos_total counter" in text
    assert 'nanodeploy:accepted_per_pos_total{position="1"} 2.0' in text


def test_registries_are_separate() -> None:
    one, two = Metrics(with_process=False), Metrics(with_process=False)
    one.counter("a", "A.").inc()
    assert b"nanodeploy:a" not in two.render()


def test_one_name_has_one_kind() -> None:
    metrics = Metrics(with_process=False)
    metrics.counter("a", "A.")
    with pytest.raises(AssertionError, match="no gauge"):
        metrics.gauge("a", "A.")
