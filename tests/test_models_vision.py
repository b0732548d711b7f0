"""Text towers against transformers: logits at every position of prompts with images, and the positions they turn by."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_support import CPU, PagedModel, Picture
from safetensors.torch import load_file, save_file
from tiny_models import make_kimi_k25, make_qwen3_5, make_qwen3_vl, make_qwen3_vl_moe
from vision_support import Layout, illustrated, oracle_logits, oracle_model, oracle_tokens, pieces

from common.errors import ConfigError
from common.layers.base import Build
from common.layers.media_positions import rope_positions
from common.layers.rope import Rope
from common.layers.rope_spec import RopeSpec
from common.models.spec import ModelSpec

TOLERANCE = 1e-4
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mrope_section": [4, 2, 2],
}
MLA_YARN = {key: value for key, value in YARN.items() if key != "mrope_section"} | {
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "qwen3-vl": (make_qwen3_vl, {}),
    "qwen3-vl-tied": (make_qwen3_vl, {"tied": True, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen3-vl-yarn": (make_qwen3_vl, {"rope_parameters": YARN, "attention_bias": True}),
    "qwen3-vl-shallow": (make_qwen3_vl, {"vision": {"deepstack_visual_indexes": []}}),
    "qwen3-vl-deep": (make_qwen3_vl, {"vision": {"deepstack_visual_indexes": [2, 0, 1]}}),
    "qwen3-vl-moe": (make_qwen3_vl_moe, {}),
    "qwen3-vl-moe-mixed": (make_qwen3_vl_moe, {"mlp_only_layers": [1], "num_experts": 24, "num_experts_per_tok": 5}),
    "qwen3.5": (partial(make_qwen3_5, vision=True), {}),
    "qwen3.5-moe": (partial(make_qwen3_5, vision=True, moe=True), {"linear_num_key_heads": 4}),
    "kimi-k25": (make_kimi_k25, {}),
    "kimi-k25-yarn": (make_kimi_k25, {"rope_parameters": MLA_YARN, "first_k_dense_replace": 0}),
}
SECTIONS = [((24, 20, 20), 128), ((11, 11, 10), 64), ((3, 3, 2), 16)]
LAYOUTS: tuple[Layout, ...] = (
    (77,),
    (5, (1, 4, 6), 7),
    (0, (1, 8, 4), 3, (1, 2, 10), 20, (1, 4, 4), 1),
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, overrides = CONFIGS[request.param]
    return make(tmp_path_factory.mktemp(request.param), seed=len(request.param), **overrides)


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["text", "one", "three"])
@pytest.mark.parametrize("size", [1000, 7])
def test_logits_at_every_position(checkpoint: Path, layout: Layout, size: int) -> None:
    prompt = illustrated(checkpoint, layout, seed=size)
    paged = PagedModel(checkpoint, seed=1)
    parts = [
        paged.step([(0, prompt.tokens[a:b])], {0: prompt.pictures})[0] for a, b in pieces(len(prompt.tokens), size)
    ]
    check(torch.cat(parts), oracle_logits(checkpoint, prompt))


def test_strangers_in_the_batch(checkpoint: Path) -> None:
    """Prompts with and without images in the same steps, each at another place."""
    prompts = {s: illustrated(checkpoint, layout, seed=10 + s) for s, layout in enumerate((*LAYOUTS, LAYOUTS[1]))}
    pictures = {s: p.pictures for s, p in prompts.items() if p.pictures}
    done = dict.fromkeys(prompts, 0)
    got: dict[int, list[torch.Tensor]] = {s: [] for s in prompts}
    paged, rng = PagedModel(checkpoint, seed=2), random.Random(3)
    while work := {s: rng.choice((1, 5, 19)) for s in prompts if done[s] < len(prompts[s].tokens)}:
        spans = [(s, prompts[s].tokens[done[s] : done[s] + n]) for s, n in work.items() if rng.random() < 0.8]
        for (s, tokens), logits in zip(spans, paged.step(spans, pictures) if spans else [], strict=True):
            got[s].append(logits)
            done[s] += len(tokens)
    for s, prompt in prompts.items():
        check(torch.cat(got[s]), oracle_logits(checkpoint, prompt))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=["one", "three"])
def test_greedy_tokens(checkpoint: Path, layout: Layout) -> None:
    prompt = illustrated(checkpoint, layout, seed=4)
    paged = PagedModel(checkpoint)
    tokens, new = [], prompt.tokens
    for _ in range(24):
        (logits,) = paged.step([(0, new)], {0: prompt.pictures})
        new = [int(logits[-1].argmax())]
        tokens += new
    assert tokens == oracle_tokens(checkpoint, prompt, 24)


def test_an_image_matters(checkpoint: Path) -> None:
    prompt = illustrated(checkpoint, LAYOUTS[1], seed=5)
    (seen,) = PagedModel(checkpoint).step([(0, prompt.tokens)], {0: prompt.pictures})
    (picture,) = prompt.pictures
    other = replace(picture, rows_NW=picture.rows_NW.flip(0))
    (upside_down,) = PagedModel(checkpoint).step([(0, prompt.tokens)], {0: [other]})
    assert (seen[-1] - upside_down[-1]).abs().max() > 0.01


def test_positions_are_those_of_transformers(tmp_path: Path) -> None:
    folder = make_qwen3_vl(tmp_path)
    rng = random.Random(6)
    for _ in range(20):
        sizes = [(1, 2 * rng.randint(1, 5), 2 * rng.randint(1, 5)) for _ in range(rng.randint(0, 4))]
        layout = (*(part for size in sizes for part in (rng.randint(0, 9), size)), rng.randint(1, 9))
        prompt = illustrated(folder, layout, seed=rng.randrange(1000))
        expected, delta = oracle_model(folder).model.get_rope_index(
            torch.tensor([prompt.tokens]), prompt.kinds_T[None], prompt.patches_G3 if sizes else None
        )
        whole = rope_positions(prompt.pictures, 0, len(prompt.tokens) + 3)
        n = len(prompt.tokens)
        assert np.array_equal(whole[:, :n], expected[:, 0].numpy())
        assert np.array_equal(whole[:, n:], np.tile(np.arange(n, n + 3) + int(delta), (3, 1)))
        assert (whole <= np.arange(n + 3)).all()
        a = rng.randint(0, n)
        b = rng.randint(a, n + 3)
        assert np.array_equal(rope_positions(prompt.pictures, a, b), whole[:, a:b])


def test_frames_of_a_clip_share_their_grid_in_time() -> None:
    clip = Picture(2, (2, 1, 3), torch.empty(6, 4))
    assert rope_positions([clip], 0, 10).tolist() == [
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize(("sections", "width"), SECTIONS)
def test_equal_positions_turn_like_plain_ones(sections: tuple[int, ...], width: int) -> None:
    build = Build(torch.bfloat16, CPU)
    plain = Rope(build, RopeSpec(theta=5e6), width, 300)
    by_axis = Rope(build, RopeSpec(theta=5e6, sections=sections), width, 300)
    positions_T = torch.randint(0, 300, (50,))
    for ours, expected in zip(by_axis(positions_T.expand(3, -1)), plain(positions_T), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(by_axis(positions_T), plain(positions_T), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("sections", "width"), SECTIONS)
def test_every_section_turns_by_its_own_axis(sections: tuple[int, ...], width: int) -> None:
    build = Build(torch.float32, CPU)
    plain = Rope(build, RopeSpec(), width, 300)
    positions_3T = torch.stack([torch.randperm(300) for _ in range(3)])
    sin_T1D = Rope(build, RopeSpec(sections=sections), width, 300)(positions_3T)[1]
    same = [(sin_T1D == plain(positions_T)[1]).all(0).flatten() for positions_T in positions_3T]
    assert [int(s[: width // 2].sum()) for s in same] == list(sections)
    assert all(torch.equal(*s.chunk(2)) for s in same)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 4, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "mrope_interleaved": False}}, "mrope_interleaved"),
        ({"vision": {"deepstack_visual_indexes": [0, 1, 0, 1]}}, "deepstack_visual_indexes"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    folder = make_qwen3_vl(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change.pop("vision", {})
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=field):
        ModelSpec.from_folder(folder)


@pytest.mark.parametrize("field", ["norm_topk_prob", "shared_expert_intermediate_size"])
def test_experts_of_another_kind_are_refused(tmp_path: Path, field: str) -> None:
    folder = make_qwen3_vl_moe(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"norm_topk_prob": False} if field == "norm_topk_prob" else {field: 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=field):
        ModelSpec.from_folder(folder)


def test_the_vision_tower_is_left_and_nothing_else(tmp_path: Path) -> None:
    folder = make_qwen3_vl(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.extra.weight"] = torch.zeros(2)
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError) as error:
        PagedModel(folder)
    assert "missing: model.language_model.layers.1.mlp.up_proj.weight" in error.value.message
    assert "unknown: model.language_model.extra.weight" in error.value.message
    assert "visual" not in error.value.message
