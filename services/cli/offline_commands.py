"""The commands that need no cluster: `generate`, `calibrate-kv`, `simulate` and `kernels build`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli import options as opt
from services.cli.report import make_console

kernels = typer.Typer(help="What is compiled for GPUs.", no_args_is_help=True)


def generate(
    model: opt.ModelFolder = "",
    input: Annotated[str, typer.Option("--input", "-i", help="One prompt a line, or JSONL; - is stdin.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL to write; - is stdout.")] = "-",
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 0,
    seed: Annotated[int | None, typer.Option()] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = None,
    kv_cache_memory_bytes: opt.KvCacheMemoryBytes = None,
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
    """Answer prompts offline: prompts to JSONL, no services."""
    from services.cli.generate import run_generate

    engine = opt.engine_fields(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
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
    )
    flags: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }
    raise typer.Exit(run_generate(model, engine, flags, input, output))


def calibrate_kv(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint; by default the demo model.")] = "",
    text: Annotated[str, typer.Option(help="File to read, like what will be served; by default a text of ours.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; by default beside the model.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read.")] = 8192,
    dtype: opt.Dtype = None,
) -> None:
    """Measure the scales of an 8-bit KV cache (`--kv-dtype fp8_e4m3`), once per model."""
    from services.cli.calibrate import run_calibrate

    engine = opt.engine_fields(dtype=dtype)
    raise typer.Exit(run_calibrate(model, text, output, max_tokens, engine, make_console()))


def simulate(
    trace: Annotated[
        str, typer.Option(help="JSONL with timestamp (ms), input_length, output_length and hash_ids, as Mooncake's.")
    ] = "",
    policy: Annotated[str, typer.Option(help="Policies to compare.")] = "cost,prefix,least_tokens,round_robin",
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 8,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 0,
    profile: Annotated[str, typer.Option(help="What a worker does in a second: gpu or cpu.")] = "gpu",
    rate_scale: Annotated[float, typer.Option(min=0.001, help="Arrivals so many times as fast as in the trace.")] = 1.0,
    num_requests: Annotated[int, typer.Option(min=1, help="Without a trace: requests to make up.")] = 2000,
    request_rate: Annotated[float, typer.Option(min=0.001, help="... arrivals per second, Poisson.")] = 30.0,
    hot_share: Annotated[float, typer.Option(min=0, max=1, help="... share that begins with one prefix.")] = 0.0,
    conversations: Annotated[int, typer.Option(min=1, help="... that the others are turns of.")] = 300,
    output_len: Annotated[int, typer.Option(min=1, help="... mean of the output tokens.")] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    json_file: Annotated[str, typer.Option("--json", help="File for the result as JSON; - prints it.")] = "",
) -> None:
    """Compare routing policies on virtual time: hit rate, time to first token, spread; no cluster is needed."""
    from services.cli.simulate import SimulateOptions, run_simulate
    from services.simulator.trace import Mixture

    mixture = Mixture(
        num_requests, request_rate, seed, hot_share, num_conversations=conversations, output_tokens=output_len
    )
    options = SimulateOptions(trace, mixture, policy, decode, prefill, profile, rate_scale, json_file)
    raise typer.Exit(run_simulate(options, make_console()))


@kernels.command("build")
def kernels_build(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint; by default the usual head sizes.")] = "",
    dtype: Annotated[str, typer.Option(help="Type that the model computes in: bfloat16 or float16.")] = "bfloat16",
    kv_dtype: Annotated[str, typer.Option(help="Type of the KV cache: auto, fp8_e4m3, or both.")] = "both",
    arch: Annotated[str, typer.Option(help="Compute capability of the GPUs.")] = "9.0a",
    jobs: Annotated[int, typer.Option(min=0, help="Files compiled at once; 0: as ninja has it.")] = 0,
    quantization: Annotated[str, typer.Option(help="As the engines will have it: auto, fp8 or none.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of an engine.")] = 1,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest step.")] = 8192,
) -> None:
    """Compile the kernels of a model, those of Triton and DeepGEMM on a GPU alone, so that no engine has to."""
    from services.cli.kernels import Build, run_build

    kinds = ["auto", "fp8_e4m3"] if kv_dtype == "both" else [kv_dtype]
    build = Build(model, dtype, kinds, arch, jobs, quantization, tensor_parallel_size, max_num_batched_tokens)
    raise typer.Exit(run_build(build, make_console()))
