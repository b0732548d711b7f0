"""Strict loading: everything or nothing, with one error that lists all that is wrong."""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path

import pytest
import torch
from models_support import CPU, PagedModel, Sum
from safetensors.torch import load_file, save_file
from tiny_models import make_llama, make_qwen3
from torch import Tensor

from common.errors import ConfigError
from common.layers.base import Layer, Slot, TensorParallel
from common.models import weights
from common.models.spec import ModelSpec
from common.models.weights import load_model

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path, dtype: str = "float32") -> Layer:
    return load_model(ModelSpec.from_folder(folder), dtype=dtype, device=CPU)


def slots_of(model: Layer) -> dict[str, Tensor]:
    return {s.name: s.target for s in model.slots()}


@pytest.mark.parametrize("make", [make_llama, make_qwen3])
def test_every_tensor_lands_in_its_slot(make: object, tmp_path: Path) -> None:
    folder = make(tmp_path, attention_bias=True)  # type: ignore[operator]
    saved = load_file(folder / WEIGHTS)
    got = slots_of(load(folder))
    assert got.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(got[name], value), name


def test_shards_and_progress(tmp_path: Path) -> None:
    single = make_llama(tmp_path / "single")
    sharded = make_llama(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    seen: list[tuple[str, int, int]] = []
    spec = ModelSpec.from_folder(sharded)
    model = load_model(spec, dtype="float32", device=CPU, progress=lambda *a: seen.append(a))
    for name, value in slots_of(load(single)).items():
        assert torch.equal(slots_of(model)[name], value)
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] == sum(v.numel() * 4 for v in load_file(single / WEIGHTS).values())
    assert {n for n, _, _ in seen} == set(load_file(single / WEIGHTS))


def test_cast_on_load(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    saved = load_file(folder / WEIGHTS)
    for name, value in slots_of(load(folder, "bfloat16")).items():
        assert torch.equal(value, saved[name].bfloat16())


def test_one_error_lists_all(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    rewrite(
        folder,
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 64),
            "model.layers.0.self_attn.q_norm.weight": torch.zeros(16),
            "model.layers.7.input_layernorm.weight": torch.zeros(64),
            "lm_head.weight": torch.zeros(512, 64, dtype=torch.int32),
        },
    )
    with pytest.raises(ConfigError) as raised:
        load(folder)
    for words in (
        "missing: model.norm.weight [64]",
        "missing: model.layers.1.mlp.up_proj.weight [96, 64]",
        "misshapen: model.layers.0.self_attn.q_proj.weight is [32, 64], the config wants [64, 64]",
        "unknown: model.layers.0.self_attn.q_norm.weight [16]",
        "unknown: model.layers.7.input_layernorm.weight",
        "of the wrong type: lm_head.weight is I32",
    ):
        assert words in raised.value.message


def test_a_hopeless_checkpoint_does_not_flood(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, num_hidden_layers=8)
    save_file({"nothing": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="and 36 more") as raised:
        load(folder)
    assert len(raised.value.message) < 5000


def test_tied_head(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    slots = slots_of(load(folder))
    assert slots["lm_head.weight"].data_ptr() == slots["model.embed_tokens.weight"].data_ptr()
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    rewrite(folder, {"lm_head.weight": embedding.clone()})
    assert torch.equal(slots_of(load(folder))["lm_head.weight"], embedding)
    rewrite(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(ConfigError, match="tied to"):
        load(folder)


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    rewrite(folder, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(3)})
    load(folder)


@pytest.mark.parametrize("kind", ["cut", "header", "shard", "map", "escape"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    folder = make_llama(tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif kind == "header":
        shard.write_bytes(b"\xff" * 64)
    elif kind == "shard":
        shard.unlink()
    elif kind == "map":
        name = next(n for n, f in content["weight_map"].items() if f == shard.name)
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    else:
        content["weight_map"]["model.norm.weight"] = "../other.safetensors"
        index.write_text(json.dumps(content))
    words = {
        "cut": "is cut short",
        "header": "not a safetensors file",
        "shard": "does not exist",
        "map": "disagree about",
        "escape": "outside of its folder",
    }
    with pytest.raises(ConfigError, match=words[kind]):
        load(folder)


def test_dummy_weights_are_seeded_and_need_no_files(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path)
    (folder / WEIGHTS).unlink()
    spec = ModelSpec.from_folder(folder, weights=False)

    def draw(seed: int) -> dict[str, Tensor]:
        return slots_of(load_model(spec, dtype="float32", device=CPU, load_format="dummy", seed=seed))

    first, again, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(first["model.norm.weight"], torch.ones(64))
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])


def test_peak_memory_is_one_model(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, hidden_size=512, head_dim=128, intermediate_size=4096, vocab_size=20000)
    nbytes = (folder / WEIGHTS).stat().st_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = load(folder, "bfloat16")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert slots_of(model)
    assert grown < nbytes / 2 + 1.3 * nbytes, f"{grown} bytes more for a model of {nbytes // 2}"


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (4, 2), (2, 4)])
def test_ranks_together_equal_one(tmp_path: Path, size: int, kv_heads: int) -> None:
    """Slicing hooks: each rank loads its share, sums go through the all-reduce, also with more ranks than heads."""
    folder = make_qwen3(tmp_path, num_key_value_heads=kv_heads, attention_bias=True)
    tokens = list(range(5, 45))
    (expected,) = PagedModel(folder).step([(0, tokens)])
    total = Sum(size)
    got: dict[int, Tensor] = {}

    def rank(r: int) -> None:
        paged = PagedModel(folder, tp=total.of(r))
        got[r] = torch.cat([paged.step([(0, tokens[:25])])[0], paged.step([(0, tokens[25:])])[0]])

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(got) == list(range(size))
    for logits in got.values():
        assert (logits - expected).abs().max() < 1e-4


def test_ranks_must_divide_heads(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_llama(tmp_path))
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        load_model(spec, dtype="float32", device=CPU, tp=Sum(3).of(0))
    with pytest.raises(ValueError, match="all_reduce"):
        TensorParallel(0, 2)
    with pytest.raises(ValueError, match="rank 2"):
        TensorParallel(2, 2, lambda x: x)


def test_ranks_draw_on_a_device_what_one_rank_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of rows at a time, whatever part of it a rank keeps."""
    monkeypatch.setattr(weights, "_DRAWN_AT_ONCE", 40)
    for dim, size in ((0, 24), (1, 7)):
        whole = torch.full((24, 7), float("nan"), dtype=torch.bfloat16)
        weights._draw_on_device(Slot("name", whole, (24, 7), dim), 3)
        assert not whole.isnan().any()
        for start in range(size):
            part = torch.full_like(whole.narrow(dim, 0, min(5, size - start)), float("nan"))
            weights._draw_on_device(Slot("name", part, (24, 7), dim, start), 3)
            assert torch.equal(part, whole.narrow(dim, start, part.shape[dim]))
    assert abs(whole.float().std() - 0.02) < 0.01


def test_drawn_on_a_device_experts_are_one_tensor() -> None:
    def slot(name: str, form: str = "", owner: str = "") -> Slot:
        return Slot(name, torch.empty(2, device="meta"), (2,), form=form, owner=owner)

    experts = [slot("a", "many", "m"), slot("b", "many", "m"), slot("c", "one", "m"), slot("d", "turned", "m")]
    assert [s.name for s in weights.drawn_slots([slot("x"), *experts, slot("y")])] == ["x", "c", "y"]
