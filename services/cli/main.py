"""The `nanodeploy` command. Each command's work is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

import nanodeploy
from common.errors import ConfigError, NanoDeployError
from services.cli import options as opt
from services.cli.gpus import default_num_prefill
from services.cli.keys_command import keys
from services.cli.offline_commands import calibrate_kv, generate, kernels, simulate
from services.cli.plan import ClusterRequest
from services.cli.report import make_console
from services.cli.state import StateFolder, state_root
from services.cli.token import admin_token, auth_headers, use_cluster_tls

app = typer.Typer(
    name="nanodeploy",
    help="Serve large language models on a cluster: prefill and decode apart, KV cache over RDMA.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanodeploy {nanodeploy.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _url(url: str, name: str, api_key: str = "") -> tuple[str, str]:
    """Where to ask, and with which key: a cluster of this machine gets its own token, which goes nowhere else."""
    if url:
        return opt.api_root(url), api_key
    folder = StateFolder(state_root(os.environ), name)
    return opt.running_cluster(folder).url, admin_token(folder) or api_key


@app.command()
def up(
    model: opt.ModelFolder = "",
    prefill: opt.PrefillOrAuto = None,
    decode: opt.Decode = 1,
    routing_policy: opt.RoutingPolicy = None,
    tool_call_parser: opt.ToolCallParser = None,
    reasoning_parser: opt.ReasoningParser = None,
    router_workers: opt.RouterWorkers = None,
    host: opt.Host = "",
    port: opt.Port = None,
    detach: opt.Detach = False,
    name: opt.Name = "default",
    config: opt.ConfigFile = None,
    redis_url: opt.RedisUrl = "",
    api_key: opt.ApiKeys = None,
    ready_timeout: opt.ReadyTimeout = 300.0,
    log_level: opt.LogLevel = "",
    served_model_name: opt.ServedModelName = None,
    runner: opt.Runner = None,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = None,
    kv_cache_memory_bytes: opt.KvCacheMemoryBytes = None,
    tensor_parallel_size: opt.TensorParallelSize = None,
    dtype: opt.Dtype = None,
    kv_dtype: opt.KvDtype = None,
    kv_scales: opt.KvScales = None,
    device: opt.Device = None,
    block_size: opt.BlockSize = None,
    load_format: opt.LoadFormat = None,
    quantization: opt.Quantization = None,
    attention_backend: opt.AttentionBackend = None,
    enforce_eager: opt.EnforceEager = None,
    deterministic: opt.Deterministic = None,
    enable_prefix_caching: opt.EnablePrefixCaching = None,
    speculative_config: opt.SpeculativeConfig = None,
) -> None:
    """Start a cluster on this machine: storage, controller, router, prefill and decode workers."""
    from services.cli.up import UpOptions, run_up

    request = ClusterRequest(
        model=model,
        num_prefill=default_num_prefill(device, os.environ) if prefill is None else prefill,
        num_decode=decode,
        router=opt.router_fields(
            policy=routing_policy,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
            workers=router_workers,
        ),
        host=host,
        port=port,
        redis_url=redis_url,
        api_keys=opt.hashed_keys(api_key),
        log_level=log_level,
        engine=opt.engine_fields(
            served_model_name=served_model_name,
            runner=runner,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_scales=kv_scales,
            device=device,
            block_size=block_size,
            load_format=load_format,
            quantization=quantization,
            attention_backend=attention_backend,
            enforce_eager=enforce_eager,
            deterministic=deterministic,
            enable_prefix_caching=enable_prefix_caching,
            speculative_config=speculative_config,
        ),
    )
    raise typer.Exit(run_up(request, UpOptions(name, config, ready_timeout), detach, make_console(lossy=True)))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    prefill: opt.Prefill = 0,
    decode: opt.Decode = 1,
    routing_policy: opt.RoutingPolicy = None,
    tool_call_parser: opt.ToolCallParser = None,
    reasoning_parser: opt.ReasoningParser = None,
    router_workers: opt.RouterWorkers = None,
    host: opt.Host = "",
    port: opt.Port = None,
    detach: opt.Detach = False,
    name: opt.Name = "default",
    config: opt.ConfigFile = None,
    redis_url: opt.RedisUrl = "",
    api_key: opt.ApiKeys = None,
    ready_timeout: opt.ReadyTimeout = 300.0,
    log_level: opt.LogLevel = "",
    served_model_name: opt.ServedModelName = None,
    runner: opt.Runner = None,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = None,
    kv_cache_memory_bytes: opt.KvCacheMemoryBytes = None,
    tensor_parallel_size: opt.TensorParallelSize = None,
    dtype: opt.Dtype = None,
    kv_dtype: opt.KvDtype = None,
    kv_scales: opt.KvScales = None,
    device: opt.Device = None,
    block_size: opt.BlockSize = None,
    load_format: opt.LoadFormat = None,
    quantization: opt.Quantization = None,
    attention_backend: opt.AttentionBackend = None,
    enforce_eager: opt.EnforceEager = None,
    deterministic: opt.Deterministic = None,
    enable_prefix_caching: opt.EnablePrefixCaching = None,
    speculative_config: opt.SpeculativeConfig = None,
) -> None:
    """Serve one model, with vLLM's flags; `--prefill N` separates prefill from decode."""
    up(**{**locals(), "model": opt.check_model_folder(model)})


@app.command()
def down(name: opt.Name = "default") -> None:
    """Stop a cluster of this machine."""
    from services.cli.up import stop

    raise typer.Exit(stop(name, make_console()))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    name: opt.Name = "default",
    controller: Annotated[str, typer.Option(help="host:port of a controller, for a cluster not started by `up`.")] = "",
) -> None:
    """Show services and workers: role, address, pid, state, load, KV by state, transport in use."""
    from services.cli.status import show_status

    use_cluster_tls(StateFolder(state_root(os.environ), name))
    raise typer.Exit(asyncio.run(show_status(name, controller, as_json, make_console())))


@app.command()
def chat(
    text: Annotated[str, typer.Argument(help="What to say; a conversation when not given.")] = "",
    url: opt.Url = "",
    name: opt.Name = "default",
    model: Annotated[str, typer.Option(help="Model to ask; the first one served when not given.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    api_key: opt.ApiKey = "",
) -> None:
    """Talk to the running cluster."""
    from services.cli.chat import ChatOptions, run_chat

    options = ChatOptions(model, system, max_tokens, temperature, seed)
    base, api_key = _url(url, name, api_key)
    raise typer.Exit(run_chat(base, text, options, make_console(), api_key))


app.command()(generate)
app.command("calibrate-kv")(calibrate_kv)
app.command()(simulate)


@app.command()
def bench(
    url: opt.Url = "",
    name: opt.Name = "default",
    model: Annotated[str, typer.Option(help="Model to ask; the first one served when not given.")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 64,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "--max-concurrency", min=1, help="Requests under way at once (closed loop).")
    ] = 8,
    request_rate: Annotated[float, typer.Option(min=0, help="Arrivals per second, Poisson; 0: closed loop.")] = 0.0,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Output tokens.")] = 64,
    shared_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use chat completions instead of completions.")] = False,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of prompts and arrivals; by default another each time.")] = None,
    warmups: Annotated[int, typer.Option(min=0, help="Requests sent before, not counted.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one request.")] = 600.0,
    api_key: opt.ApiKey = "",
    json_file: Annotated[str, typer.Option("--json", help="File for the result as JSON; - prints it.")] = "",
) -> None:
    """Measure an OpenAI endpoint: tokens, time to first token, time per token, gaps."""
    import httpx

    from services.cli.api import list_models
    from services.cli.bench.command import run_bench
    from services.cli.bench.load import LoadOptions

    base, api_key = _url(url, name, api_key)
    if not model:
        with httpx.Client(timeout=10.0, headers=auth_headers(api_key)) as client:
            models = list_models(client, base)
        if not models:
            raise ConfigError(f"{base} serves no model: give --model")
        model = models[0]
    load = LoadOptions(
        model=model,
        num_prompts=num_prompts,
        concurrency=concurrency,
        request_rate=request_rate,
        input_len=input_len,
        output_len=output_len,
        shared_prefix_len=shared_prefix_len,
        chat=chat,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        temperature=temperature,
        timeout_s=timeout,
    )
    raise typer.Exit(run_bench(base, load, warmups, api_key, json_file, make_console(stderr=json_file == "-")))


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Also check this model folder.")] = "",
    name: opt.Name = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine and the running cluster; every failure comes with its fix."""
    from services.cli.doctor.command import run_doctor

    use_cluster_tls(StateFolder(state_root(os.environ), name))
    raise typer.Exit(run_doctor(model, name, as_json, make_console()))


app.add_typer(keys, name="keys")
app.add_typer(kernels, name="kernels")


@app.command(hidden=True)
def launch(file: Path, lock: int) -> None:
    """The launcher of a detached cluster; `lock` is the descriptor by which it owns the cluster."""
    from services.cli.up import launch_detached

    raise typer.Exit(launch_detached(file, lock, make_console(lossy=True)))


def main() -> None:
    """Exit codes: 0 well, 1 failed, 2 wrong use or configuration: a path that cannot be used is the latter."""
    try:
        app()
    except NanoDeployError as error:
        _say_error(error.message)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.filename is None:
            raise
        _say_error(f"{error.filename}: {error.strerror}")
        sys.exit(2 if isinstance(error, _WRONG_PATH) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


_WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def _say_error(message: str) -> None:
    make_console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
