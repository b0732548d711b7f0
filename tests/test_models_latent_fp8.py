"""Latent attention with an 8-bit cache: its layout and size, what it costs in exactness, and the ways of an engine.

Logits are judged by the root mean square of their error over that of the logits. Random models magnify: a rounding
sends a token to other experts, or makes an indexer take other positions, and those matter as much as any. The trained
model says what the same bytes cost where weights mean something.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import Pair, Solo, greedy, prompts
from family_modes import MODES, run_cell
from models_support import PagedModel
from mtp_support import MTP, make_mtp
from test_kv_fp8 import alone
from test_models_latent import GLM, R1, V32, fresh_prompt, read
from tiny_models import make_deepseek_v3, make_deepseek_v4, make_deepseek_v32, make_glm_moe_dsa
from torch import Tensor
from torch.nn import functional
from train_models import FOLDER as TRAINED
from train_models import SEED, Language, make_tokenizer

from common.attention.context import AttentionBackend
from common.attention.cpu import CpuBackend
from common.attention.reference import ReferenceBackend
from common.config import EngineConfig
from common.engine.sizing import size_engine
from common.errors import ConfigError
from common.kvcache.layout import TAIL_GROUP, KVLayout, RegionSpec, compare
from common.models.kv import kv_layout, size_num_blocks
from common.models.spec import ModelSpec
from common.types import Role

FP8, FLOAT8 = "fp8_e4m3", "float8_e4m3fn"
ROW_FORMAT = "512 e4m3, pow2 float32 per 128, 64 bfloat16"
DENSE = {"first_k_dense_replace": 3}
Maker = Callable[..., Path]
SPARSE: dict[str, Maker] = {"deepseek_v32": make_deepseek_v32, "glm_moe_dsa": make_glm_moe_dsa}


def layout_of(spec: ModelSpec, kv_dtype: str) -> KVLayout:
    blocks = {"full": 4, TAIL_GROUP: 1}
    return kv_layout(spec, kv_dtype=kv_dtype, dtype="bfloat16", block_size=64, num_blocks=blocks)


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def logits(folder: Path, tokens: list[int], kv_dtype: str, step: int = 1000, **more: Any) -> Tensor:
    paged = PagedModel(folder, kv_dtype=kv_dtype, **{"backend": CpuBackend(), **more})
    return torch.cat([paged.step([(0, tokens[a : a + step])])[0] for a in range(0, len(tokens), step)]).float()


def trained_text(count: int) -> list[int]:
    """Fresh sentences of the language that the trained model knows."""
    language, tokenizer, rng = Language.make(SEED), make_tokenizer(), random.Random(11)
    ids: list[int] = []
    while len(ids) < count:
        ids += [1, *tokenizer.encode(language.sentence(rng, rng.randint(40, 160))).ids, 2]
    return ids[:count]


@pytest.mark.parametrize(("config", "gain"), [(R1, 1.756), (V32, 1.777), (GLM, 1.777)], ids=["v3", "v3.2", "glm-5"])
def test_blocks_in_the_same_memory(tmp_path: Path, config: dict[str, Any], gain: float) -> None:
    """At the releases' dimensions."""
    spec = read(tmp_path, config)
    sizes: dict[str, Any] = {"dtype": "bfloat16", "block_size": 64, "max_model_len": 32768, "max_num_seqs": 64}
    sizes |= {"num_tails": 128, "max_num_batched_tokens": 8192}
    blocks = {t: size_num_blocks(spec, 40 << 30, kv_dtype=t, **sizes)["full"] for t in ("bfloat16", FLOAT8)}
    assert blocks[FLOAT8] / blocks["bfloat16"] >= gain > 1.75


def test_the_bytes_of_a_release(tmp_path: Path) -> None:
    spec = read(tmp_path, V32)
    layout = layout_of(spec, FLOAT8)
    latents, keys, tail = layout.regions
    assert (latents.dtype, latents.width, latents.scale_format) == ("uint8", 656, ROW_FORMAT)
    assert (keys.dtype, keys.width, keys.scale_format) == ("uint8", 136, "128 e4m3, pow2 float32 per 128, 0 bfloat16")
    assert (tail.dtype, tail.scale_format) == ("bfloat16", "")
    place = layout.place("mla_latent")
    assert (place.token_stride, place.layer_stride, place.offset) == (656, 64 * 656, 0)
    assert latents.scales_hash == b""
    drafts = {r.name: r for r in layout_of(replace(spec, mtp_layers=1).with_drafts(), FLOAT8).regions}
    assert (drafts["draft_mla_latent"].width, drafts["draft_hidden"].dtype) == (656, "bfloat16")


def with_region(layout: KVLayout, **changes: Any) -> KVLayout:
    first, *others = layout.regions
    changed: RegionSpec = type(first)(**{f: getattr(first, f) for f in first.__struct_fields__} | changes)
    return KVLayout(model_hash=layout.model_hash, groups=layout.groups, regions=(changed, *others))


def test_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    spec = read(tmp_path, R1)
    ours, plain = layout_of(spec, FLOAT8), layout_of(spec, "bfloat16")
    assert compare(ours, ours).equal
    assert compare(plain, ours).reason == "region mla_latent.dtype: source has 'bfloat16', reader has 'uint8'"
    other = with_region(ours, scale_format="512 e4m3, float32 per 128, 64 bfloat16")
    assert compare(other, ours).reason.startswith("region mla_latent.scale_format: source has '512 e4m3, float32 per")
    assert len({x.fingerprint() for x in (ours, plain, other)}) == 3


def test_a_prefill_worker_with_another_layout_is_not_read(tmp_path: Path) -> None:
    folder = make_deepseek_v3(tmp_path)
    pair = Pair(folder, prefill={"kv_dtype": "bfloat16"}, kv_dtype=FP8)
    (prompt,) = prompts(5, (60,))
    answer = pair.submit(prompt, greedy(8))
    pair.run()
    (verdict,) = pair.verdicts
    assert verdict.state == "refused"
    assert "mla_latent.dtype" in verdict.detail
    assert answer.stats.transferred_tokens == 0
    assert answer.tokens[0] == alone(folder, prompt, {"kv_dtype": FP8}, 8).tokens


@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE])
@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.name)
def test_without_experts_and_selection_logits_are_near(name: str, backend: AttentionBackend, tmp_path: Path) -> None:
    make: Maker = {"deepseek_v3": make_deepseek_v3, **SPARSE}[name]
    layers = {"mlp_layer_types": ["dense"] * 3} if name == "glm_moe_dsa" else DENSE
    more = {"index_topk": 400} if name in SPARSE else {}
    folder = make(tmp_path, seed=3, initializer_range=0.1, **layers, **more)
    tokens = fresh_prompt(150)
    exact, got = logits(folder, tokens, "float32"), logits(folder, tokens, FLOAT8, backend=backend)
    assert 1e-3 < off(got, exact) < 0.08
    assert off(exact.roll(1, 0), exact) > 0.8
    chunks = logits(folder, tokens, FLOAT8, 7, backend=backend)
    assert off(chunks, got) < 5e-3


@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE])
def test_with_experts_and_selection_they_are_no_garbage(name: str, tmp_path: Path) -> None:
    make: Maker = {"deepseek_v3": make_deepseek_v3, **SPARSE}[name]
    folder = make(tmp_path, seed=3)
    tokens = fresh_prompt(150)
    exact, got = logits(folder, tokens, "float32"), logits(folder, tokens, FLOAT8)
    assert off(got, exact) < (0.6 if name in SPARSE else 0.35)
    assert off(exact.roll(1, 0), exact) > 1.2
    assert (got.argmax(-1) == exact.argmax(-1)).float().mean() > 0.4
    assert off(got[:24], exact[:24]) < 0.35  # all positions are seen


def test_up_to_top_k_sparse_is_dense(tmp_path: Path) -> None:
    folder = make_deepseek_v32(tmp_path)
    tokens = fresh_prompt(60)
    sparse, dense = (logits(folder, tokens, FLOAT8, 20, dense=dense) for dense in (False, True))
    assert torch.equal(sparse[:20], dense[:20])
    assert off(sparse[40:], dense[40:]) > 0.05


def test_perplexity_of_a_trained_model() -> None:
    """Within one per cent of fp32's, and the same best token in 97 of 100 places."""
    ids = trained_text(1600)
    texts = [ids[a : a + 400] for a in range(0, 1600, 400)]

    def read_all(kv_dtype: str) -> tuple[float, Tensor]:
        rows = torch.cat([logits(TRAINED, text, kv_dtype)[:-1] for text in texts])
        targets = torch.tensor([t for text in texts for t in text[1:]])
        return functional.cross_entropy(rows, targets).item(), rows.argmax(-1)

    (exact, best), (ours, other) = read_all("float32"), read_all(FLOAT8)
    assert exact < 1.6  # it has learnt something: 3.6 is a guess
    assert abs(ours - exact) < 0.01
    assert (best == other).float().mean() > 0.97


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers: dict[str, Maker] = {"deepseek_v3": make_deepseek_v3, **SPARSE}
    return {name: make(tmp_path_factory.mktemp(name), seed=7) for name, make in makers.items()}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE])
def test_every_mode_gives_the_same_tokens(folders: dict[str, Path], name: str, mode: str) -> None:
    """The bytes in the cache are the same; how a prompt is cut decides between absorbed and expanded, which round."""
    engine = {"kv_dtype": FP8}
    expected = [alone(folders[name], p, engine) for p in prompts(71, (1, 17, 100))]
    cell = run_cell(mode, folders[name], expected, engine)
    assert cell.mismatches == cell.near_ties == []
    assert cell.error < 2e-3


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_hand_off_between_block_sizes(folders: dict[str, Path], block_size: int) -> None:
    folder = folders["deepseek_v32"]
    pair = Pair(folder, prefill={"kv_dtype": FP8, "block_size": 48 - block_size}, kv_dtype=FP8, block_size=block_size)
    (prompt,) = prompts(6, (90,))
    answer = pair.submit(prompt, greedy(30))
    pair.run()
    assert answer.stats.transferred_tokens == len(prompt)
    assert answer.tokens[0] == alone(folder, prompt, {"kv_dtype": FP8}, 30).tokens
    pair.check_idle()


def test_drafts_change_no_tokens(tmp_path: Path) -> None:
    folder = make_mtp(tmp_path)
    (prompt,) = prompts(8, (70,))
    want = alone(folder, prompt, {"kv_dtype": FP8}, 60).tokens
    solo = Solo(folder, kv_dtype=FP8, speculative_config=MTP)
    answer = solo.submit(prompt, greedy(60))
    solo.run()
    assert answer.tokens[0] == want
    assert {r.name: r.width for r in solo.decode.parts.layout.regions}["draft_mla_latent"] == 56  # 32 + 4 + 16, filled
    trained, text = Solo(TRAINED, kv_dtype=FP8, speculative_config=MTP), tuple(trained_text(80))
    answer = trained.submit(text, greedy(60))
    trained.run()
    assert answer.stats.accepted_draft_tokens > 20
    assert answer.tokens[0] == alone(TRAINED, text, {"kv_dtype": FP8}, 60).tokens


def test_deepseek_v4_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = make_deepseek_v4(tmp_path)
    config = EngineConfig(model=str(folder), kv_dtype=FP8, kv_cache_memory_bytes=1 << 24)
    with pytest.raises(ConfigError, match=r"kv_dtype fp8_e4m3.*deepseek_v4.*compressed entries.*bfloat16") as raised:
        size_engine(config, ModelSpec.from_folder(folder), Role.DECODE)
    assert raised.value.param == "kv_dtype"
