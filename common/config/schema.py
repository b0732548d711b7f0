"""One frozen config per component; together they are the sections of the YAML file.

Nothing here reads the environment: a service's `__main__` loads the file, lays environment overrides over
it (`common.config.load`) and hands one section down. Every field is read by something (a test says so).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LogConfig(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"
    otlp_endpoint: str = Field(
        "", description="URL of an OpenTelemetry collector (OTLP over HTTP); OTEL_EXPORTER_OTLP_ENDPOINT when empty"
    )
    otlp_ratio: float = Field(1.0, ge=0, le=1, description="share of requests traced, of those no caller traces")


class SpeculativeConfig(_Section):
    """Drafts of decode workers. Names follow vLLM's `--speculative-config`."""

    method: Literal["none", "ngram", "mtp"] = Field(
        "none", description="ngram: what followed the same words before; mtp: the checkpoint's own prediction layer"
    )
    num_speculative_tokens: int = Field(3, ge=1, le=4, description="most drafts in a step; a sequence adapts below it")
    prompt_lookup_max: int = Field(0, ge=0, description="ngram: longest end of the text looked for; 0 as min, or 5")
    prompt_lookup_min: int = Field(0, ge=0, description="ngram: shortest end of the text looked for; 0 as max, or 2")

    @model_validator(mode="after")
    def _in_order(self) -> SpeculativeConfig:
        if self.prompt_lookup_max and self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min {self.prompt_lookup_min} is greater than prompt_lookup_max {self.prompt_lookup_max}"
            )
        return self


class EngineConfig(_Section):
    """One model on one device. Names follow vLLM's flags."""

    model: str = Field("", description="folder of a Hugging Face checkpoint")
    served_model_name: str = Field("", description="name in the API; the folder's name when empty")
    runner: Literal["auto", "generate", "pooling"] = Field(
        "auto",
        description="pooling serves the model for embeddings instead of text; auto: where the checkpoint is made for "
        "them, by its modules.json",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto is cuda where an NVIDIA driver and a torch for it are found, else cpu"
    )
    devices: tuple[int, ...] = Field(
        (), description="GPUs by number, one for each rank; empty: the first tensor_parallel_size ones"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3"] = Field(
        "auto",
        description="auto is dtype; fp8_e4m3 (or fp8) keeps a byte per number: keys and values need scales, latent "
        "attention makes its own",
    )
    kv_scales: str = Field(
        "",
        description="file of scales for fp8_e4m3; by default the checkpoint's, or kv_cache_scales.json in its folder",
    )
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights, for benchmarks")
    quantization: Literal["auto", "fp8", "none"] = Field(
        "auto",
        description="of weights on a GPU: auto keeps FP8 as stored, fp8 makes others so but what the checkpoint "
        "excludes, none has dtype for all",
    )
    max_model_len: int = Field(0, ge=0, description="tokens; 0 takes the checkpoint's")
    max_num_seqs: int = Field(0, ge=0, description="sequences in a batch; 0 is 64 on the CPU and 512 on a GPU")
    max_num_batched_tokens: int = Field(
        0,
        ge=0,
        description="tokens computed in one step; 0 is 2048 on the CPU, 8192 on a GPU, 4096 in prefill workers there",
    )
    max_waiting_seqs: int = Field(1024, ge=1, description="sequences queued before requests are refused")
    block_size: int = Field(
        0, ge=0, multiple_of=16, description="tokens in a KV block; 0 is 16 on the CPU and 64 on a GPU"
    )
    kv_cache_memory_bytes: int = Field(0, ge=0, description="KV pool; 0 sizes it from gpu_memory_utilization")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of device memory to use")
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig = SpeculativeConfig()
    state_snapshot_interval: int = Field(
        2048, ge=1, description="recurrent layers: tokens of a long prompt between two cached copies of their state"
    )
    tensor_parallel_size: int = Field(1, ge=1)
    attention_backend: Literal["auto", "reference", "cpu", "flashinfer", "flashmla", "fixed"] = "auto"
    enforce_eager: bool = Field(False, description="record no CUDA graphs: slower decode steps, less memory")
    cuda_graph_sizes: tuple[int, ...] = Field(
        (), description="batch sizes to record decode steps for; empty: close to each other up to max_num_seqs"
    )
    async_scheduling: Literal["auto", "on", "off"] = Field(
        "auto", description="plan a step while the one before runs; auto: on a GPU, and not on the CPU"
    )
    deterministic: bool = Field(
        False, description="kernels that add in a fixed order: the same tokens in every batch, slower on a GPU"
    )
    sparse_attention: bool = Field(True, description="false: models that select positions attend to all of them")
    num_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 is all cores")
    lease_ttl_s: float = Field(30.0, gt=0, description="life of published KV after its last extent")
    check_ledger: bool = Field(False, description="recount every KV block at every step; for tests, slow")
    max_restarts: int = Field(5, ge=0, description="engine restarts in 5 minutes before the worker gives up")
    hang_timeout_s: float = Field(
        60.0,
        gt=0,
        description="an engine that computes no layer and says nothing for this long is killed and restarted",
    )

    @field_validator("kv_dtype", mode="before")
    @classmethod
    def _other_name(cls, value: object) -> object:
        return "fp8_e4m3" if value == "fp8" else value  # vLLM has both


class HandoffConfig(_Section):
    """How a decode worker uses prefill workers."""

    transports: tuple[str, ...] = ("ucx",)
    require_transport: str = Field("", description="refuse peers that this (prefix of a) transport does not reach")
    min_remote_tokens: int = Field(32, ge=0, description="fewer uncached prompt tokens are prefilled here")
    accept_timeout_s: float = Field(5.0, gt=0, description="order sent -> accepted, by a worker that computes nothing")
    progress_timeout_s: float = Field(
        10.0, gt=0, description="longest silence of an accepted order whose worker computes nothing"
    )
    read_timeout_s: float = Field(10.0, gt=0, description="one read, queued -> verified")


class UcxConfig(_Section):
    """Passed to UCX as it is; see `ucx_info -c`."""

    library: str = Field("", description="path of a libucp to load instead of the wheel's (for verbs)")
    tls: str = Field("posix,cma,self,tcp", description="UCX_TLS")
    net_devices: str = Field("", description="UCX_NET_DEVICES; empty is all")


class TlsConfig(_Section):
    """Between services (docs/operations.md). Files are PEM and read again when they are renewed."""

    ca: str = Field("", description="file of the authority that peers must be signed by; empty: plain text to others")
    cert: str = Field("", description="file of this service's certificate, with what leads to the authority")
    key: str = Field("", description="file of its private key")
    server_name: str = Field("", description="name in the servers' certificates, where it is not the address")


class ControllerConfig(_Section):
    host: str = "127.0.0.1"
    port: Port = 7100
    http_port: Port = 7101
    redis_url: str = Field("redis://127.0.0.1:7099/0", description="Redis 7.0+ or Valkey")
    namespace: str = Field("nanodeploy", description="prefix of all keys")
    lease_ttl_s: float = Field(3.0, gt=0, description="a silent worker is removed after this long")
    heartbeat_s: float = Field(1.0, gt=0, description="how often workers renew their lease; less than its time")
    max_object_bytes: int = Field(64 * 2**20, gt=0, description="one stored response, file or batch")
    max_stored_bytes: int = Field(2**30, gt=0, description="all of them; more is refused with 429")
    max_object_ttl_s: int = Field(30 * 86400, gt=0, description="longest time that anything is stored")
    admin_token: str = Field("", description="shows who may manage API keys; without one nobody may")

    @model_validator(mode="after")
    def _renewed_in_time(self) -> ControllerConfig:
        if self.heartbeat_s >= self.lease_ttl_s:
            raise ValueError(
                f"heartbeat_s {self.heartbeat_s:g} must be less than lease_ttl_s {self.lease_ttl_s:g}: "
                "workers that live would be removed between two of their heartbeats"
            )
        return self


class WorkerConfig(_Section):
    worker_id: str = Field("", description="stable name; made from host and port when empty")
    host: str = "127.0.0.1"
    port: Port = 0
    http_port: Port = 0
    advertise_host: str = Field("", description="host others reach it at; `host` when empty")
    controllers: tuple[str, ...] = ("127.0.0.1:7100",)
    drain_grace_s: float = Field(
        30.0, ge=0, description="asked to stop, requests, orders and open leases get this long"
    )
    reattach_s: float = Field(30.0, gt=0, description="unacknowledged deltas are kept this long without a stream")
    engine: EngineConfig = EngineConfig()
    handoff: HandoffConfig = HandoffConfig()
    ucx: UcxConfig = UcxConfig()


ToolCallParser = Literal[
    "auto",
    "none",
    "hermes",
    "qwen3",
    "qwen3_coder",
    "qwen3_xml",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "kimi_k2",
    "glm45",
    "glm47",
    "llama3_json",
    "llama4_json",
    "llama4_pythonic",
    "pythonic",
]
ReasoningParser = Literal[
    "auto", "none", "deepseek_r1", "deepseek_v3", "deepseek_v4", "glm45", "kimi_k2", "qwen3", "think"
]
RoutingPolicy = Literal[
    "cost", "deadline", "prefix", "session", "least_tokens", "power_of_two", "round_robin", "random"
]
ROUTING_NAMES = {
    "cache_aware": "prefix",
    "prefix_hash": "prefix",
    "prefixaware": "prefix",
    "kvaware": "prefix",
    "consistent_hash": "session",
    "consistent_hashing": "session",
    "least_loaded": "least_tokens",
    "roundrobin": "round_robin",
}
"""What the routers of SGLang and vLLM call policies that mean the same."""


class RouterConfig(_Section):
    host: str = "127.0.0.1"
    port: Port = 8000
    controllers: tuple[str, ...] = ("127.0.0.1:7100",)
    workers: int = Field(1, ge=1, le=256, description="router processes that share the port, each with its own limits")
    worker_port: Port = Field(
        0, description="of several, process i answers at this port + i too, for metrics of one at a time; 0: no"
    )
    access_log: bool = Field(False, description="a line for each request: method, path, status, ms, key id, tokens")
    model_path: str = Field("", description="folder with tokenizer.json; the workers' own when empty")
    chat_template: str = Field("", description="file with a Jinja template that replaces the checkpoint's")
    tokenizer_backend: Literal["auto", "huggingface"] = Field(
        "auto", description="auto encodes by fastokens where that gives the same tokens as huggingface's tokenizers"
    )
    tool_call_parser: ToolCallParser = Field(
        "auto", description="format of tool calls; auto: by the chat template; names as of vLLM's flag"
    )
    reasoning_parser: ReasoningParser = Field(
        "auto", description="marks of reasoning; auto: by the chat template; names as of vLLM's flag"
    )
    request_timeout_s: float = Field(600.0, gt=0)
    connect_timeout_s: float = Field(5.0, gt=0)
    resume_wait_s: float = Field(
        30.0, ge=0, description="an answer whose decode worker is lost, and no other there, waits this long for one"
    )
    drain_grace_s: float = Field(10.0, ge=0, description="asked to stop, running requests get this long")
    ssl_certfile: str = Field("", description="certificate of the API's port, PEM; with ssl_keyfile: HTTPS")
    ssl_keyfile: str = Field("", description="its private key; both are read again when they are renewed")
    allowed_origins: tuple[str, ...] = Field(
        ("*",), description="web pages of which origins browsers let use the API (CORS), as of vLLM's flag; *: all"
    )
    max_body_bytes: int = Field(16 * 2**20, gt=0)
    max_concurrent_requests: int = Field(4096, ge=1, description="more are refused with 429")
    queue_factor: float = Field(
        2.0, ge=0, description="requests sent to workers, as a multiple of their batches; the rest wait here; 0: all"
    )
    max_queued_requests: int = Field(1024, ge=1, description="waiting, of each priority; more are refused with 429")
    max_queue_wait_s: float = Field(30.0, gt=0, description="longest wait for a place: foreseen 429, else 503")
    max_n: int = Field(128, ge=1, le=128, description="choices of one prompt")
    max_prompts: int = Field(1024, ge=1, description="prompts of one request")
    max_images: int = Field(16, ge=0, description="images of one request")
    api_keys: tuple[str, ...] = Field(
        (), description="keys of the API, or sha256: and their hash; with none here or at the controller it is open"
    )
    require_api_key: bool = Field(False, description="refuse requests without a key even while there is none")
    admin_token: str = Field("", description="the controller's, to follow the keys kept there; is a key as well")
    response_ttl_s: int = Field(86400, gt=0, description="stored responses can be had for this long")
    file_ttl_s: int = Field(30 * 86400, gt=0, description="files and batches, unless the client asks for less")
    max_file_bytes: int = Field(64 * 2**20, gt=0, description="an uploaded file")
    batch_concurrency: int = Field(16, ge=1, description="lines of a batch that this router runs at once")
    stream_buffer_tokens: int = Field(8192, ge=1, description="a client that falls this far behind is cut off")
    policy: RoutingPolicy = Field(
        "cost",
        description="how workers are chosen; what SGLang's and vLLM's routers call the same is understood: cache_aware "
        "is prefix, consistent_hash is session",
    )
    separation: Literal["auto", "always"] = Field(
        "auto",
        description="auto: prompts that a decode worker is predicted to bring sooner by itself skip the prefill "
        "workers; always: a prefill worker is named for all",
    )
    ttft_target_ms: float = Field(1000.0, gt=0, description="policy deadline: keep the first token within this")
    prefix_index_blocks: int = Field(
        500_000, ge=1, description="cached KV blocks of all workers that routing knows of, at about 130 bytes each"
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _other_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        name = value.replace("-", "_")
        return ROUTING_NAMES.get(name, name)

    @model_validator(mode="after")
    def _ports_of_all(self) -> RouterConfig:
        if self.worker_port and self.worker_port + self.workers - 1 > 65535:
            raise ValueError(f"worker_port {self.worker_port} leaves no port for each of {self.workers} workers")
        return self


class ClusterConfig(_Section):
    """The whole file. Each service reads its own section."""

    log: LogConfig = LogConfig()
    tls: TlsConfig = TlsConfig()
    controller: ControllerConfig = ControllerConfig()
    router: RouterConfig = RouterConfig()
    prefill: WorkerConfig = WorkerConfig(port=7200, http_port=7201)
    decode: WorkerConfig = WorkerConfig(port=7300, http_port=7301)
