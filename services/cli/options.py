"""Flags that several commands share, and how engine flags become config fields. Spellings are vLLM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from common.errors import ConfigError, UnavailableError
from common.types.keys import HASH_PREFIX, hash_of_setting
from services.cli.hint import hint
from services.cli.state import ClusterState, StateFolder

ENGINE_PANEL = "Engine"
CLUSTER_PANEL = "Cluster"


def _cluster(help: str, *names: str, **rules: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=CLUSTER_PANEL, **rules)


def _engine(help: str, *names: str, **rules: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=ENGINE_PANEL, **rules)


ModelFolder = Annotated[str, typer.Option(help="Folder of a Hugging Face checkpoint; by default the demo model.")]
Name = Annotated[str, typer.Option(help="Name of the cluster on this machine.", envvar="NANODEPLOY_CLUSTER")]
Url = Annotated[str, typer.Option(help="URL of the API, with or without /v1; by default the running cluster's.")]

Host = Annotated[str, _cluster("Address the API listens on; by default 127.0.0.1.")]
Port = Annotated[
    int | None, _cluster("Port of the API, 0: any; by default 8000 or the next free one.", min=0, max=65535)
]
_PREFILL = "Prefill workers; 0: decode workers prefill themselves."
Prefill = Annotated[int, _cluster(_PREFILL, min=0)]
PrefillOrAuto = Annotated[int | None, _cluster(f"{_PREFILL} By default 1, and 0 where there is one GPU.", min=0)]
Decode = Annotated[int, _cluster("Decode workers.", min=1)]
RoutingPolicy = Annotated[
    str | None,
    _cluster("How the router chooses workers: cost, prefix, session, deadline, least_tokens, power_of_two, ..."),
]
ToolCallParser = Annotated[
    str | None, _cluster("Format of tool calls: auto (by the chat template), none, hermes, qwen3_coder, ...")
]
ReasoningParser = Annotated[
    str | None, _cluster("Marks of reasoning: auto (by the chat template), none, qwen3, deepseek_r1, ...")
]
RouterWorkers = Annotated[int | None, _cluster("Router processes that share the port. By default 1.", min=1)]
Detach = Annotated[bool, _cluster("Return when the cluster is ready; `down` stops it.", "--detach", "-d")]
ConfigFile = Annotated[str | None, _cluster("YAML file to start from.", "--config")]
RedisUrl = Annotated[str, _cluster("A Redis 7.0+ or Valkey to use; by default one of its own.")]
ReadyTimeout = Annotated[float, _cluster("Seconds until the first token must have come.", min=1)]
ApiKeys = Annotated[
    list[str] | None,
    _cluster(
        "Key that the API asks for; may be given again. By default it is open until `keys create`.",
        "--api-key",
        envvar=["NANODEPLOY_API_KEY", "VLLM_API_KEY"],
        show_default=False,
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_API_KEY", help="Key for --url; a cluster of this machine needs none.", show_default=False
    ),
]
LogLevel = Annotated[str, _cluster("debug, info, warning or error.")]

ServedModelName = Annotated[str | None, _engine("Name in the API; by default the folder's.")]
Runner = Annotated[
    str | None, _engine("pooling serves embeddings, generate text; auto: by the checkpoint's modules.json.")
]
MaxModelLen = Annotated[int | None, _engine("Prompt and output tokens of one sequence.")]
MaxNumSeqs = Annotated[int | None, _engine("Sequences in a batch.")]
MaxNumBatchedTokens = Annotated[int | None, _engine("Tokens computed in one step.")]
GpuMemoryUtilization = Annotated[float | None, _engine("Share of device memory to use.")]
KvCacheMemoryBytes = Annotated[int | None, _engine("Bytes of the KV pool of each worker.")]
TensorParallelSize = Annotated[int | None, _engine("Devices that share one model.")]
Dtype = Annotated[str | None, _engine("auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, _engine("auto, cpu or cuda.")]
KvDtype = Annotated[
    str | None,
    _engine("Of the KV cache: auto, float32, bfloat16, float16 or fp8_e4m3.", "--kv-dtype", "--kv-cache-dtype"),
]
KvScales = Annotated[str | None, _engine("File that `calibrate-kv` wrote; by default the checkpoint's own scales.")]
BlockSize = Annotated[int | None, _engine("Tokens in a KV block, a multiple of 16.")]
LoadFormat = Annotated[str | None, _engine("auto, or dummy: random weights, for benchmarks.")]
Quantization = Annotated[
    str | None, _engine("auto keeps a checkpoint's FP8 on a GPU, fp8 makes it of any other, none keeps none.")
]
AttentionBackend = Annotated[str | None, _engine("auto, or one that the log names.")]
EnforceEager = Annotated[bool | None, _engine("Record no CUDA graphs.", "--enforce-eager/--no-enforce-eager")]
Deterministic = Annotated[
    bool | None, _engine("Kernels that add in a fixed order, on a GPU too.", "--deterministic/--no-deterministic")
]
EnablePrefixCaching = Annotated[
    bool | None, _engine("Reuse KV of equal prefixes.", "--enable-prefix-caching/--no-enable-prefix-caching")
]
SpeculativeConfig = Annotated[
    str | None, _engine('Drafts, as JSON: {"method": "ngram", "num_speculative_tokens": 3}.', metavar="JSON")
]

_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names


def router_fields(**flags: str | int | None) -> dict[str, Any]:
    """The flags that were given, as fields of `RouterConfig`."""
    return {name: value for name, value in flags.items() if value is not None}


def engine_fields(**flags: Any) -> dict[str, Any]:
    """The flags that were given, as fields of `EngineConfig`."""
    fields = {name: value for name, value in flags.items() if value is not None}
    for name in ("dtype", "kv_dtype"):
        if name in fields:
            fields[name] = _DTYPES.get(fields[name], fields[name])
    if "kv_scales" in fields:
        fields["kv_scales"] = str(Path(fields["kv_scales"]).expanduser().resolve())
    if "speculative_config" in fields:
        fields["speculative_config"] = _json_object("--speculative-config", fields["speculative_config"])
    return fields


def hashed_keys(keys: list[str] | None) -> tuple[str, ...]:
    """As they are written into files."""
    return tuple(HASH_PREFIX + hash_of_setting(key) for key in keys or ())


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag}: not valid JSON: {error.msg} at column {error.colno}, got {text!r}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: must be a JSON object, got {text!r}")
    return value


def api_root(url: str) -> str:
    """The URL that `/v1/...` is appended to, of any that people write: without a scheme, with `/v1` or a last slash.

    Raises `ConfigError` when it names no host.
    """
    text = url.strip()
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"--url {url!r} is no address of an API: write it as http://127.0.0.1:8000/v1", param="url")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def check_model_folder(path: str) -> str:
    """Raises `ConfigError` unless `path` is a folder of a Hugging Face checkpoint."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"model {path!r} is not a folder: give the folder of a downloaded Hugging Face checkpoint", param="model"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {folder} has no config.json: not a Hugging Face checkpoint", param="model")
    return str(folder.resolve())


def running_cluster(folder: StateFolder) -> ClusterState:
    """The cluster that is up. Raises `UnavailableError` that says how to start one."""
    state = folder.running()
    if state is None:
        start = hint("up", folder.name)
        raise UnavailableError(f"no cluster {folder.name!r} is up: start one with `{start}`, or give --url")
    if state.phase != "ready":
        raise UnavailableError(f"cluster {folder.name!r} is {state.phase}: see `{hint('status', folder.name)}`")
    return state
