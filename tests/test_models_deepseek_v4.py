"""DeepSeek-V4 against transformers, over several lengths of its windows and entries, however the work is cut.

The reference computes each prompt alone, unpadded, from nothing. `test_families.py` has the engine's modes.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import PagedModel, Sum
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, make_deepseek_v4
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.attention.context import AttentionBackend
from common.attention.cpu import CpuBackend
from common.attention.reference import ReferenceBackend
from common.errors import ConfigError
from common.kernels import cpu
from common.kvcache.layout import TAIL_GROUP
from common.models.kv import kv_layout, size_num_blocks
from common.models.spec import ModelSpec
from common.models.weights import load_model

TOLERANCE = 1e-4
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "window": {"kinds": "ww", "num_hash": 0},
    "csa": {"kinds": "cc", "num_hash": 2, "sliding_window": 20},
    "hca": {"kinds": "hh", "num_hash": 0},
    "mixed": {"kinds": "hwc", "num_attention_heads": 8, "o_groups": 4, "index_n_heads": 24, "index_topk": 16},
    "short": {"kinds": "chw", "compress_rates": RATES, "sliding_window": 24, "index_topk": 3, "num_hash": 3},
    "odd": {
        "kinds": "ch",
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 48},
        "num_attention_heads": 3,
        "o_groups": 1,
        "head_dim": 24,
        "partial_rotary_factor": 0.25,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "rope_parameters": None,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deepseek_v4(tmp_path_factory.mktemp(request.param), seed=len(request.param), **CONFIGS[request.param])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if request.param == "reference":
        return ReferenceBackend()
    if cpu.library() is None:
        pytest.skip("the kernels were not built")
    return CpuBackend()


def fresh_prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def oracle(folder: Path, *prompts: list[int]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [model(torch.tensor([tokens])).logits[0] for tokens in prompts]


def check(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_prompts_of_many_lengths(checkpoint: Path, backend: AttentionBackend) -> None:
    """Alone and all in one step. A window of 128 tokens, entries of 4 and of 128 begin and end in between."""
    prompts = [fresh_prompt(n) for n in (1, 3, 4, 5, 8, 127, 128, 129, 256, 300)]
    expected = oracle(checkpoint, *prompts)
    paged = PagedModel(checkpoint, backend=backend, num_blocks=128)
    for s, (tokens, want) in enumerate(zip(prompts, expected, strict=True)):
        check(paged.step([(s, tokens)])[0], want)
    together = PagedModel(checkpoint, backend=backend, num_blocks=128, seed=1).step(list(enumerate(prompts)))
    for got, want in zip(together, expected, strict=True):
        check(got, want)


@pytest.mark.parametrize("width", [1, 7, 130])
def test_cuts(checkpoint: Path, backend: AttentionBackend, width: int) -> None:
    """Chunks of one width all along, or up to the last tokens, which come one at a time."""
    tokens = fresh_prompt(280)
    paged = PagedModel(checkpoint, backend=backend, seed=width)
    cuts = [*range(0, 260, width), *range(260, 281)]
    got = torch.cat([paged.step([(0, tokens[a:b])])[0] for a, b in itertools.pairwise(cuts)])
    check(got, oracle(checkpoint, tokens)[0])


@pytest.mark.parametrize("width", [1, 3, 5])
def test_steps_as_they_are_recorded(checkpoint: Path, backend: AttentionBackend, width: int) -> None:
    """Every token may complete an entry there, and what is none lands where nobody reads."""
    prompts = [fresh_prompt(100 + 10 * width), fresh_prompt(120 + 10 * width)]
    paged = PagedModel(checkpoint, backend=backend, seed=width, recorded=True)
    got = [[paged.step([(s, tokens[: len(tokens) - 10 * width])])[0]] for s, tokens in enumerate(prompts)]
    for back in range(10 * width, 0, -width):
        work = [(s, tokens[len(tokens) - back :][:width]) for s, tokens in enumerate(prompts)]
        for parts, part in zip(got, paged.step(work), strict=True):
            parts.append(part)
    for parts, want in zip(got, oracle(checkpoint, *prompts), strict=True):
        check(torch.cat(parts), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_token_gets_has_the_same_bits_in_any_batch(checkpoint: Path, dtype: str) -> None:
    if cpu.library() is None:
        pytest.skip("the kernels were not built")
    prompts = {s: fresh_prompt(n) for s, n in enumerate((200, 140, 30, 270))}
    made = {"backend": CpuBackend(), "dtype": dtype}
    alone = {s: PagedModel(checkpoint, **made).step([(s, p)])[0] for s, p in prompts.items()}  # type: ignore[arg-type]
    rng, before = random.Random(5), torch.get_num_threads()
    paged = PagedModel(checkpoint, **made, seed=2, num_blocks=128)  # type: ignore[arg-type]
    done, got = dict.fromkeys(prompts, 0), {s: [] for s in prompts}
    try:
        while any(done[s] < len(p) for s, p in prompts.items()):
            torch.set_num_threads(rng.randrange(1, 4))
            left = [s for s, p in prompts.items() if done[s] < len(p)]
            work = [(s, prompts[s][done[s] : done[s] + rng.choice((1, 1, 3, 64))]) for s in left if rng.random() < 0.7]
            for (s, tokens), logits in zip(work, paged.step(work) if work else [], strict=True):
                got[s].append(logits)
                done[s] += len(tokens)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(torch.cat(parts), alone[s]) for s, parts in got.items())


def test_going_back_to_any_position(checkpoint: Path) -> None:
    """Tokens that turn out wrong are computed over; what they left in the cache is read by nobody."""
    tokens = fresh_prompt(150)
    (want,) = oracle(checkpoint, tokens)
    paged = PagedModel(checkpoint, num_blocks=128)
    (got,) = paged.step([(0, tokens[:100])])
    check(got, want[:100])
    for position in range(100, 150, 2):
        wrong = [(t + 7) % VOCAB_SIZE for t in tokens[position : position + 5]]
        kept = PagedModel._forget
        paged._forget = lambda *_: None  # type: ignore[method-assign]
        paged.step([(0, wrong)])
        paged._lens[0] = position
        paged._forget = kept.__get__(paged)  # type: ignore[method-assign]
        check(paged.step([(0, tokens[position : position + 2])])[0], want[position : position + 2])


def names(folder: Path, rename: list[tuple[str, str]], extra: dict[str, Tensor] | None = None) -> Path:
    """The checkpoint under other names, in a folder beside it."""
    tensors = load_file(folder / "model.safetensors")
    other = folder.parent / f"{folder.name}-renamed"
    other.mkdir(exist_ok=True)
    out = {}
    for name, tensor in tensors.items():
        for pattern, ours in rename:
            name = re.sub(pattern, ours, name)
        out[name] = tensor
    save_file(out | (extra or {}), other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    return other


RELEASE = [
    (r"^model\.embed_tokens", "embed"),
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.", ""),
    (r"attn\.norm\.", "attn.kv_norm."),
]


def test_names_of_the_release(tmp_path: Path) -> None:
    folder = make_deepseek_v4(tmp_path / "saved", kinds="chw")
    extra = {"mtp.0.attn.wq_a.weight": torch.zeros(2, 2), "mtp.0.norm.weight": torch.zeros(2)}
    tokens = fresh_prompt(40)
    (want,) = PagedModel(folder).step([(0, tokens)])
    other = names(folder, RELEASE, extra)
    assert "layers.0.attn.kv_norm.weight" in load_file(other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    for field in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor"):
        del config[field]
    config |= {
        "compress_ratios": [4, 128, 0, 0],
        "num_hash_layers": 1,
        "qk_rope_head_dim": 16,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 128},
    }
    (other / "config.json").write_text(json.dumps(config))
    assert torch.equal(PagedModel(other).step([(0, tokens)])[0], want)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = make_deepseek_v4(tmp_path / "saved", kinds="w")
    other = names(folder, [], {"norm.weight": torch.zeros(64)})
    with pytest.raises(ConfigError, match=r"two names: model\.norm\.weight and norm\.weight"):
        PagedModel(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 1"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": None, "compress_ratios": [4, 128, 8]}, "compress_ratios"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "mlp_layer_types has a hash_moe layer after"),
        ({"mlp_layer_types": ["moe", "moe"]}, "mlp_layer_types must say"),
        ({"o_groups": 3}, "o_groups"),
        ({"index_head_dim": 8}, "index_head_dim must be 16"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ({"compress_rates": {"compressed_sparse_attention": 0}}, "compress_rates.compressed_sparse_attention"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((make_deepseek_v4(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_folder(tmp_path)


def test_the_cache_of_the_release_is_what_the_paper_counts(tmp_path: Path) -> None:
    """43 layers of which 2 are windows alone, 21 CSA and 20 HCA; bf16; no weights."""
    kinds = "ww" + "ch" * 20 + "c"
    wide = {"head_dim": 512, "partial_rotary_factor": 0.125, "index_head_dim": 128, "hidden_size": 4096}
    config = json.loads((make_deepseek_v4(tmp_path) / "config.json").read_text()) | wide
    full = json.loads((make_deepseek_v4(tmp_path / "x", kinds=kinds, num_hash=3) / "config.json").read_text())
    config |= {k: full[k] for k in ("num_hidden_layers", "layer_types", "mlp_layer_types")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_folder(tmp_path, weights=False)
    sizes = {"kv_dtype": "bfloat16", "dtype": "bfloat16", "block_size": 16}
    blocks = {g.name: 1 for g in spec.cache.groups} | {TAIL_GROUP: 1}
    layout = kv_layout(spec, **sizes, num_blocks=blocks)  # type: ignore[arg-type]
    assert [(g.name, g.block_size, g.window) for g in layout.groups] == [
        ("full", 128, 0),
        ("window", 16, 128),
        ("window_csa", 16, 8),
        (TAIL_GROUP, 1, 0),
    ]
    per_token = {g.name: layout.block_nbytes(g.name) / g.block_size for g in layout.groups}
    assert per_token["full"] == 2 * (21 * (512 + 128) / 4 + 20 * 8)
    assert per_token["window"] == 2 * (43 * 512 + 20 * 2 * 512)
    assert per_token["window_csa"] == 2 * 21 * 4 * (512 + 128)
    given = {"max_model_len": 100_000, "max_num_seqs": 8, "num_tails": 16, "max_num_batched_tokens": 512}
    need = {"full": 782, "window": 41, "window_csa": 34}
    least = sum(n * layout.block_nbytes(g) for g, n in need.items()) + 16 * layout.block_nbytes(TAIL_GROUP)
    for budget in (least, least + 1, 2 * least, 5 * least):
        found = size_num_blocks(spec, budget, **sizes, **given)  # type: ignore[arg-type]
        assert all(found[g] >= n for g, n in need.items())
        assert budget * 0.8 < sum(layout.block_nbytes(g) * n for g, n in found.items()) <= budget
        assert all(found[g] <= 2 * 8 * need[g] for g in ("window", "window_csa"))
    with pytest.raises(ConfigError, match=str(least)):
        size_num_blocks(spec, least - 1, **sizes, **given)  # type: ignore[arg-type]


def test_bfloat16_and_random_weights(tmp_path: Path) -> None:
    """bf16 stays near fp32, but where a token goes to another expert; drawn weights give a model that runs."""
    tokens = fresh_prompt(90)
    folder = make_deepseek_v4(tmp_path, kinds="wch", compress_rates=RATES, initializer_range=0.05)
    (want,) = PagedModel(folder).step([(0, tokens)])
    low = PagedModel(folder, dtype="bfloat16")
    near = torch.nn.functional.cosine_similarity(low.step([(0, tokens)])[0], want)
    assert near.median() > 0.999
    assert near.min() > 0.9
    spec = ModelSpec.from_folder(folder)
    low.model = load_model(spec, dtype="float32", device=torch.device("cpu"), load_format="dummy")
    assert low.step([(5, tokens)])[0].isfinite().all()


@pytest.mark.parametrize("kinds", ["hc", "w"])
def test_ranks_together_equal_one(tmp_path: Path, kinds: str) -> None:
    """Heads, groups of the output and experts are split; windows, entries and the indexer are whole on each rank."""
    folder = make_deepseek_v4(tmp_path, kinds=kinds, compress_rates=RATES, num_attention_heads=8, o_groups=4)
    tokens = fresh_prompt(70)
    (want,) = PagedModel(folder).step([(0, tokens)])
    total = Sum(2)

    def run(rank: int) -> Tensor:
        paged = PagedModel(folder, tp=total.of(rank), seed=rank)
        return torch.cat([paged.step([(0, tokens[a:b])])[0] for a, b in ((0, 33), (33, 70))])

    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(run, range(2)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_it_runs_without_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens = make_deepseek_v4(tmp_path, kinds="hcw", compress_rates=RATES), fresh_prompt(60)
    (want,) = oracle(folder, tokens)
    monkeypatch.setattr(cpu, "library", lambda: None)
    paged = PagedModel(folder)
    check(torch.cat([paged.step([(0, tokens[a:b])])[0] for a, b in ((0, 33), (33, 60))]), want)
