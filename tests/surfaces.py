"""What others rely on, spelled out. A change here is a change for them, made on purpose."""

from __future__ import annotations

EXPORTS = {
    "nanodeploy": ["LLM", "RequestOutput", "SamplingParams", "__version__"],
    "common.config": [
        "ClusterConfig",
        "ControllerConfig",
        "EngineConfig",
        "HandoffConfig",
        "LogConfig",
        "RouterConfig",
        "UcxConfig",
        "WorkerConfig",
    ],
    "common.telemetry": [
        "Metrics",
        "TraceContext",
        "configure_logging",
        "get_logger",
        "log_context",
        "new_trace",
        "parse_traceparent",
    ],
}

RPCS = {
    "ControllerService": ["Register", "Heartbeat", "Watch", "Drain", "Deregister"],
    "DecodeService": ["Submit", "Stream", "Generate"],
    "PrefillService": ["Session"],
    "WorkerService": ["GetStatus", "DrainWorker", "GetLedger"],
}

_ENGINE = [
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--dtype",
    "--device",
    "--block-size",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
]
_CLUSTER = [
    "--prefill",
    "--decode",
    "--host",
    "--port",
    "--detach",
    "-d",
    "--name",
    "--config",
    "--redis-url",
    "--ready-timeout",
    "--log-level",
    "--served-model-name",
    "--tensor-parallel-size",
    *_ENGINE,
]
FLAGS = {
    "up": ["--model", *_CLUSTER],
    "serve": ["model", *_CLUSTER],
    "down": ["--name"],
    "status": ["--json", "--name", "--controller"],
    "chat": ["text", "--url", "--name", "--model", "--system", "--max-tokens", "--temperature", "--seed"],
    "generate": [
        "--model",
        "--input",
        "-i",
        "--output",
        "-o",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--ignore-eos",
        *_ENGINE,
    ],
    "bench": [
        "--url",
        "--name",
        "--model",
        "--num-prompts",
        "--concurrency",
        "--request-rate",
        "--input-len",
        "--output-len",
        "--shared-prefix-len",
        "--chat",
        "--temperature",
        "--seed",
        "--warmups",
        "--timeout",
        "--api-key",
        "--json",
    ],
    "doctor": ["--model", "--name", "--json"],
}
