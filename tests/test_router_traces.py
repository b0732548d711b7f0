"""Traces from the caller through the router to the worker, at a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from router_support import MODEL, cluster, say

from common.config.schema import LogConfig
from common.errors import ConfigError
from common.telemetry import spans
from common.types import RequestStats
from services.worker.trace import record_decode, record_prefill

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
STATS = RequestStats(prompt_tokens=9, computed_tokens=9, queue_ms=1, prefill_ms=2, decode_queue_ms=3)


class Collector:
    def __init__(self) -> None:
        self.paths: list[str] = []
        self.found: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.found |= {span.name: span for span in scope.spans}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    try:
        yield made
    finally:
        spans.close_tracing()
        made.close()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "a secret of mine"}], **more}


async def test_one_trace_from_caller_to_worker(tmp_path: Path, collector: Collector) -> None:
    spans.configure_tracing(LogConfig(otlp_endpoint=collector.url), "router")
    async with cluster(tmp_path / "model", say("hello")) as made:
        headers = {"traceparent": CALLER, "x-request-id": "mine"}
        answer = await made.http.post("/v1/chat/completions", json=chat(), headers=headers)
        [request] = made.worker.requests
    record_decode(request.traceparent, request.request_id, STATS, 0.5, "")
    record_prefill(request.traceparent, request.request_id, 0.1, "")
    spans.close_tracing()
    assert set(collector.paths) == {"/v1/traces"}
    router = collector.found["POST /v1/chat/completions"]
    assert router.trace_id.hex() == CALLER[3:35]
    assert router.parent_span_id.hex() == CALLER[36:52]
    assert answer.headers["traceparent"].split("-")[2] == router.span_id.hex()
    attributes = {a.key: a.value for a in router.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["nanodeploy.request_id"].string_value == "mine"
    assert attributes["gen_ai.usage.input_tokens"].int_value == answer.json()["usage"]["prompt_tokens"]
    decode = collector.found["decode"]
    assert {span.trace_id for span in collector.found.values()} == {router.trace_id}
    assert decode.parent_span_id == router.span_id
    steps = [collector.found[name] for name in ("queue", "first step")]
    assert all(step.parent_span_id == decode.span_id for step in steps)
    assert all(decode.start_time_unix_nano - 10**8 <= s.start_time_unix_nano <= s.end_time_unix_nano for s in steps)
    assert "secret" not in str(collector.found)


async def test_a_callers_no_is_heard_and_errors_are_marked(tmp_path: Path, collector: Collector) -> None:
    spans.configure_tracing(LogConfig(), "router", collector.url)
    async with cluster(tmp_path / "model", say("hello")) as made:
        await made.http.post("/tokenize", json=chat(), headers={"traceparent": CALLER[:-2] + "00"})
        made.members.remove("d0")
        await made.post("/v1/chat/completions", **chat())
    spans.close_tracing()
    assert set(collector.found) == {"POST /v1/chat/completions"}
    assert collector.found["POST /v1/chat/completions"].status.code == 2
    assert not collector.found["POST /v1/chat/completions"].parent_span_id


async def test_off_by_default_and_a_lost_collector_costs_no_request(tmp_path: Path, collector: Collector) -> None:
    spans.configure_tracing(LogConfig(), "router")
    assert not spans.tracing()
    async with cluster(tmp_path / "model", say("hello")) as made:
        answer = await made.post("/v1/chat/completions", **chat())
        assert answer.headers["traceparent"].endswith("-00")
        spans.configure_tracing(LogConfig(otlp_endpoint=collector.url), "router")
        collector.close()
        assert (await made.post("/v1/chat/completions", **chat())).status_code == 200
    assert collector.found == {}


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"nanodeploy\[otel\]"):
        spans.configure_tracing(LogConfig(otlp_endpoint="http://127.0.0.1:9"), "router")
    assert not spans.tracing()
