"""Two GPUs, or four, share a model over NCCL: their answers, judged by one GPU alone, in recorded steps and in others.

In fp32 both give the same tokens. In bf16 sums over ranks round otherwise than one sum does, so tokens of one engine
are given to another as a prompt: at each place the other says how far that token is behind its own best. A token may be
the other's second, but not by much, as long as nothing jumps: where a rounding chooses another expert, it may be behind
by anything (up to 4.2 on a CPU, where fp32 gives the same tokens), so a mixture takes all of its experts then.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
import torch
from engine_support import prompts
from teacher_forced import EQUAL, LIMIT
from torch import Tensor

from common.errors import RankLostError
from common.parallel.collectives import make_collectives
from common.parallel.store import Rendezvous, file_store
from nanodeploy import LLM, SamplingParams

pytestmark = pytest.mark.gpu

COUNT = 48
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": lambda folder: tiny_models.make_llama(folder, seed=3, **SIZES | {"intermediate_size": 1024}),
    "qwen3_moe": lambda folder: moe(folder),
    "qwen3_moe, all experts": lambda folder: moe(folder, num_experts=4, num_experts_per_tok=4),
}


def moe(folder: Path, **sizes: int) -> Path:
    return tiny_models.make_qwen3_moe(folder, seed=3, **SIZES | {"moe_intermediate_size": 256} | sizes)


@pytest.fixture
def two(cuda: torch.device) -> None:
    need(2)


def need(ranks: int) -> None:
    """Skips where there are fewer GPUs."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")


def engine(folder: Path, **options: Any) -> LLM:
    sizes = {"gpu_memory_utilization": 0.3, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    return LLM(folder, **{"dtype": "bfloat16"} | sizes | options)


def answers(llm: LLM, asked: Sequence[tuple[int, ...]]) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, seed=0)
    return [list(o.outputs[0].token_ids) for o in llm.generate([list(p) for p in asked], sampling)]


def behind(llm: LLM, asked: Sequence[tuple[int, ...]], given: Sequence[list[int]]) -> list[float]:
    """How far each token given is behind the best, in logits."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0, prompt_logprobs=1)
    out: list[float] = []
    whole = [[*p, *tokens] for p, tokens in zip(asked, given, strict=True)]
    for prompt, output in zip(asked, llm.generate(whole, sampling), strict=True):
        found = output.prompt_logprobs
        assert found is not None
        first = len(found.token_logprobs) - COUNT
        assert first >= len(prompt) - 1
        out += [
            best - own
            for own, best in zip(
                found.token_logprobs[first:], found.top_logprobs[first * found.top_n :: found.top_n], strict=True
            )
        ]
    return out


@pytest.mark.parametrize("eager", [False, True], ids=["recorded", "eager"])
@pytest.mark.parametrize("model", ["llama", "qwen3_moe, all experts"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_answer_as_one_gpu_does(ranks: int, model: str, eager: bool, cuda: torch.device, tmp_path: Path) -> None:
    need(ranks)
    folder = MODELS[model](tmp_path / "checkpoint")
    asked = prompts(11, [5, 130, 700, 64])
    with engine(folder, tensor_parallel_size=ranks, enforce_eager=eager) as several:
        given = answers(several, asked)
    with engine(folder, enforce_eager=eager) as single:
        gaps = behind(single, asked, given)
        torch.cuda.synchronize()
    assert len(gaps) == COUNT * len(asked)
    assert max(gaps) <= LIMIT
    assert sum(gap > EQUAL for gap in gaps) <= 0.05 * len(gaps)


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_tokens_of_one_gpu_in_fp32(ranks: int, model: str, cuda: torch.device, tmp_path: Path) -> None:
    need(ranks)
    folder, asked = MODELS[model](tmp_path / "checkpoint"), prompts(15, [5, 130, 700, 64])
    with engine(folder, dtype="float32", tensor_parallel_size=ranks) as several:
        given = answers(several, asked)
    with engine(folder, dtype="float32") as single:
        assert answers(single, asked) == given


@pytest.mark.parametrize("eager", [False, True], ids=["recorded", "eager"])
def test_a_killed_rank_ends_what_waits_for_it(eager: bool, two: None, tmp_path: Path) -> None:
    """Sums in one kernel and NCCL's would both spin for ever; afterwards the GPU is free for others."""
    folder = MODELS["llama"](tmp_path / "checkpoint")
    began: list[float] = []

    def kill(done: int, total: int) -> None:
        if not began:
            began.append(time.monotonic())
            rank.kill()

    with engine(folder, tensor_parallel_size=2, enforce_eager=eager) as pair:
        (rank,) = [p for p in psutil.Process().children() if "common.engine.rank" in p.cmdline()]
        sampling = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True, seed=0)
        with pytest.raises(RankLostError, match="rank 1 "):
            pair.generate(prompts(13, [20] * 4), sampling, progress=kill)
        assert time.monotonic() - began[0] < 10
    torch.cuda.synchronize()
    assert time.monotonic() - began[0] < 25
    with engine(folder, enforce_eager=eager) as single:
        assert answers(single, prompts(14, [20]))


def test_one_engine_on_the_second_gpu(two: None, tmp_path: Path) -> None:
    folder = MODELS["llama"](tmp_path / "checkpoint")
    asked = prompts(12, [33, 90])
    with engine(folder, devices=(1,)) as second:
        given = answers(second, asked)
        assert torch.cuda.memory_allocated(1) > torch.cuda.memory_allocated(0)
    with engine(folder) as first:
        assert max(behind(first, asked, given)) <= LIMIT


SUMS = ((1, 4096), (3, 4096), (64, 4096), (512, 4096), (5, 72), (1024, 4096))


def sum_on_rank(path: str, rank: int, ranks: int, one_shot: bool) -> None:
    """Sums and gathers of one rank, eager and recorded; raises if one is wrong, says where it stands if it hangs."""
    faulthandler.dump_traceback_later(40, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    meeting = Rendezvous(file_store(path, ranks), rank, ranks)
    collectives = make_collectives(device, meeting, rank, ranks, 60.0, one_shot=one_shot)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for call, shape in enumerate(SUMS):
                parts = [whole_numbers(call, r, shape, dtype, device) for r in range(ranks)]
                want = torch.stack(parts).float().sum(0).to(dtype)
                x = parts[rank].clone()
                assert torch.equal(collectives.all_reduce(x), want), (dtype, shape)
                graph, still = torch.cuda.CUDAGraph(), parts[rank].clone()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    once = collectives.all_reduce(still * 1)
                    twice = collectives.all_reduce(once.clone())
                    both = collectives.all_gather(still)
                for _ in range(20):
                    graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(once, want), (dtype, shape)
                assert torch.equal(twice, (want.float() * ranks).to(dtype)), (dtype, shape)
                assert torch.equal(both, torch.stack(parts)), (dtype, shape)
    meeting.least([0])
    began = time.monotonic()
    collectives.close()  # with a graph alive that refers to it
    assert time.monotonic() - began < 10


def whole_numbers(call: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sums of these, and of their sums, are exact in every type."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("one_shot", [False, True], ids=["nccl", "one shot"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_and_gathers(ranks: int, one_shot: bool, cuda: torch.device, tmp_path: Path) -> None:
    need(ranks)
    context = multiprocessing.get_context("spawn")
    store = str(tmp_path / "store")
    processes = [context.Process(target=sum_on_rank, args=(store, r, ranks, one_shot)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
