"""An 8-bit KV cache in engines: scales of a checkpoint or a file, the same tokens on every way, blocks that refuse
readers with other scales."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import Pair, Solo, greedy, llama, prompts, reference_tokens, windowed
from families import FAMILIES
from family_modes import MODES, Watch, run_cell
from family_oracle import Expected, FamilyOracle
from safetensors.torch import load_file, save_file
from test_attention_reference import Case

from common.attention.reference import ReferenceBackend
from common.config import EngineConfig
from common.engine.calibrate import STEPS, KVMeter
from common.engine.sizing import size_engine
from common.errors import ConfigError
from common.kvcache.layout import compare
from common.kvcache.scales import SCALE_FORMAT, KVScales
from common.models.cache_spec import attention_cache
from common.models.kv import size_num_blocks
from common.models.kv_scales import FILE_NAME, find_scales, read_scales, write_scales
from common.models.spec import ModelSpec
from common.types import Role
from nanodeploy import LLM

__all__ = ["llama", "windowed"]

FP8 = "fp8_e4m3"
FLOAT8 = "float8_e4m3fn"
SPELLINGS = {
    "vLLM": ("attn.k_scale", "attn.v_scale"),
    "compressed-tensors": ("k_scale", "v_scale"),
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "llm-compressor": ("k_proj.output_scale", "v_proj.output_scale"),
    "one for both": ("kv_scale",),
}


def copy_of(folder: Path, target: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint with more tensors in it."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if tensors:
        held = load_file(target / "model.safetensors")
        save_file(held | tensors, target / "model.safetensors", {"format": "pt"})
    return target


def ones(layers: int, value: float = 0.05) -> dict[int, KVScales]:
    return {layer: KVScales(k=value, v=value) for layer in range(layers)}


@pytest.fixture(scope="module")
def calibrated(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the file of a calibration beside it."""
    folder = copy_of(llama, tmp_path_factory.mktemp("fp8") / "llama")
    with LLM(folder, dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        assert llm.calibrate_kv([list(p) for p in prompts(70, (200, 150))]) == folder / FILE_NAME
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_checkpoint_brings_its_scales(llama: Path, tmp_path: Path, spelling: str, dtype: torch.dtype) -> None:
    names = SPELLINGS[spelling]
    values = {(layer, part): 0.25 + layer / 8 + part / 2 for layer in range(3) for part in range(len(names))}
    tensors = {
        f"model.layers.{layer}.self_attn.{names[part]}": torch.tensor([v] if layer else v, dtype=dtype)
        for (layer, part), v in values.items()
    }
    folder = copy_of(llama, tmp_path / "model", tensors)
    found = find_scales(ModelSpec.from_folder(folder))
    assert found == {i: KVScales(k=values[i, 0], v=values[i, len(names) - 1]) for i in range(3)}
    solo = Solo(folder, kv_dtype=FP8)
    region = solo.decode.parts.layout.regions[0]
    assert (region.dtype, region.scale_format) == (FLOAT8, SCALE_FORMAT)
    answer = solo.submit(prompts(1, (20,))[0], greedy(4))
    solo.run()
    assert len(answer.tokens[0]) == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}, "layer 0 has a k scale and no other"),
        ({"model.layers.1.self_attn.kv_scale": torch.tensor(0.0)}, "kv_scale is 0.0; a scale must be positive"),
        ({"model.layers.1.self_attn.kv_scale": torch.ones(2)}, r"is F32 \[2\]; a scale is one float"),
        ({"model.layers.1.self_attn.kv_scale": torch.tensor(1.0)}, "layers 0, 2 have no scales"),
        ({}, "nanodeploy calibrate-kv"),
    ],
)
def test_scales_that_cannot_be_used(
    llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    folder = copy_of(llama, tmp_path / "model", tensors)
    config = EngineConfig(model=str(folder), kv_dtype=FP8, kv_cache_memory_bytes=1 << 22)
    with pytest.raises(ConfigError, match=message):
        size_engine(config, ModelSpec.from_folder(folder), Role.DECODE)


def test_a_file_of_another_model_is_refused(calibrated: Path, windowed: Path, tmp_path: Path) -> None:
    file = calibrated / FILE_NAME
    with pytest.raises(ConfigError, match="was made for another model"):
        read_scales(file, ModelSpec.from_folder(windowed))
    spec = ModelSpec.from_folder(calibrated)
    content = json.loads(file.read_text())
    for change, message in (
        ({"kv_dtype": "float8_e5m2"}, "scales for kv_dtype 'float8_e5m2'"),
        ({"layers": {"0": {"k": 1.0}}}, "malformed scales"),
        ({"layers": {"0": {"k": 1.0, "v": -1.0}}}, "malformed scales"),
        ({"layers": [1, 2]}, "malformed scales"),
    ):
        (tmp_path / "scales.json").write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match=message):
            read_scales(tmp_path / "scales.json", spec)


def test_a_named_file_comes_first(calibrated: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(calibrated)
    write_scales(tmp_path / "other.json", spec, ones(3))
    assert find_scales(spec, str(tmp_path / "other.json")) == ones(3)
    assert find_scales(spec) == read_scales(calibrated / FILE_NAME, spec) != ones(3)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("model", ["llama", "windowed"])
def test_every_mode_gives_the_same_bits(request: pytest.FixtureRequest, model: str, mode: str, tmp_path: Path) -> None:
    """In 8 bits too, a sequence's logits do not depend on what an engine does to it on its way."""
    check_mode(request.getfixturevalue(model), mode, tmp_path, 0.0)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "qwen3_next"])
def test_latents_indexer_keys_and_states_beside_others(name: str, tmp_path: Path) -> None:
    """Few and many new tokens take two ways through a latent: a last bit may round a number to its neighbour."""
    family = next(f for f in FAMILIES if f.name == name)
    folder = next(iter(family.configurations.values()))(tmp_path / "model")
    solo = check_mode(folder, "handed over", tmp_path, 1e-2, **family.engine)
    forms = {r.name: (r.dtype, bool(r.scale_format)) for r in solo.decode.parts.layout.regions}
    assert forms[{"qwen3_next": "kv"}.get(name, "mla_latent")][1]
    assert all(scaled == (dtype in (FLOAT8, "uint8")) for dtype, scaled in forms.values())


def check_mode(folder: Path, mode: str, tmp_path: Path, tolerance: float, **engine: Any) -> Solo:
    spec = ModelSpec.from_folder(folder)
    write_scales(tmp_path / "scales.json", spec, ones(spec.num_layers))
    engine |= {"kv_dtype": FP8, "kv_scales": str(tmp_path / "scales.json")}
    expected = [alone(folder, p, engine) for p in prompts(71, (1, 17, 100))]
    cell = run_cell(mode, folder, expected, engine)
    assert cell.mismatches == cell.near_ties == []
    assert cell.error <= tolerance
    return Solo(folder, **engine)


def alone(folder: Path, prompt: tuple[int, ...], engine: dict[str, Any], count: int = 40) -> Expected:
    """What an engine answers that has nothing else to do."""
    solo = Solo(folder, **engine)
    watch = Watch(solo.decode)
    answer = solo.submit(prompt, greedy(count))
    solo.run()
    logits = torch.cat([piece.logits_TV for piece in watch.pieces[f"r{answer.slot}"]])  # type: ignore[attr-defined]
    return Expected(prompt, answer.tokens[0], logits, 0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_close_to_fp32(calibrated: Path, tmp_path: Path, backend: str) -> None:
    """Rounding to 8 bits changes logits a little: by less than a fifth of their spread."""
    oracle = FamilyOracle(calibrated, FAMILIES[0].reference, tmp_path)
    for prompt in prompts(72, (40, 90)):
        expected = oracle.answer(prompt, 2)
        got = alone(calibrated, prompt, {"kv_dtype": FP8, "attention_backend": backend}, 2)
        known = slice(0, len(prompt))
        off = (got.logits_PV[known] - expected.logits_PV[known]).pow(2).mean().sqrt()
        assert 0 < off / expected.logits_PV[known].std() < 0.2


def test_readers_with_other_scales_are_refused(calibrated: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(calibrated)
    scales = find_scales(spec)
    nudged = scales | {2: replace(scales[2], v=scales[2].v * (1 + 2**-23))}
    write_scales(tmp_path / "other.json", spec, nudged)
    pair = Pair(calibrated, prefill={"kv_dtype": FP8, "kv_scales": str(tmp_path / "other.json")}, kv_dtype=FP8)
    verdict = compare(pair.prefill.parts.layout, pair.decode.parts.layout)
    assert not verdict.ok
    assert verdict.reason.startswith("region kv.scales_hash: source has ")
    assert pair.prefill.parts.layout.fingerprint() != pair.decode.parts.layout.fingerprint()
    (prompt,) = prompts(73, (60,))
    answer = pair.submit(prompt, greedy(8))
    pair.run()
    assert answer.stats.transferred_tokens == 0
    assert answer.tokens[0] == alone(calibrated, prompt, {"kv_dtype": FP8}, 8).tokens


def test_a_plain_reader_is_refused(calibrated: Path) -> None:
    pair = Pair(calibrated, prefill={"kv_dtype": FP8})
    (prompt,) = prompts(74, (60,))
    answer = pair.submit(prompt, greedy(8))
    pair.run()
    assert answer.stats.transferred_tokens == 0
    assert answer.tokens[0] == reference_tokens(calibrated, prompt, 8)
    verdict = compare(pair.prefill.parts.layout, pair.decode.parts.layout)
    assert verdict.reason == "region kv.dtype: source has 'float8_e4m3fn', reader has 'float32'"


def test_twice_the_blocks_of_bf16(llama: Path, windowed: Path) -> None:
    for folder in (llama, windowed):
        spec = ModelSpec.from_folder(folder)
        blocks = [
            size_num_blocks(
                spec,
                1 << 30,
                kv_dtype=kv_dtype,
                dtype="bfloat16",
                block_size=16,
                max_model_len=512,
                max_num_seqs=64,
                num_tails=128,
                max_num_batched_tokens=2048,
                scales=ones(spec.num_layers),
            )
            for kv_dtype in (FLOAT8, "bfloat16")
        ]
        assert blocks[0]["full"] >= 1.95 * blocks[1]["full"]


def test_a_calibration_measures_what_is_cached(calibrated: Path) -> None:
    """Against the keys and values that transformers caches."""
    model = FAMILIES[0].reference(calibrated)
    largest = torch.zeros(3, 2)
    with torch.inference_mode():
        for prompt in prompts(70, (200, 150)):
            cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
            for layer in range(3):
                for part, x in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
                    largest[layer, part] = max(largest[layer, part], x.abs().max())
    content = json.loads((calibrated / FILE_NAME).read_text())
    assert content["tokens"] == 350
    assert content["model_hash"] == ModelSpec.from_folder(calibrated).model_hash.hex()
    for layer, scales in find_scales(ModelSpec.from_folder(calibrated)).items():
        for scale, most in zip((scales.k, scales.v), largest[layer].tolist(), strict=True):
            assert most / 448 * (1 - 1e-5) <= scale < most / 224


@pytest.mark.parametrize("seed", range(8))
def test_a_scale_is_the_best_of_those_that_hold_the_range(seed: int) -> None:
    """Keys that hardly differ from token to token are rounded alike: with a bad scale, far from what they are."""
    random.seed(seed)  # of the case
    case = Case([(0, 200)], heads=(4, 2), width=16)
    spread = torch.tensor([[0.05], [1.0]])
    keys = 4 * torch.randn(2, 16) + spread * torch.randn(200, 2, 16)
    pool = SimpleNamespace(region=lambda name: case.cache[:, None], scales=lambda name: None)
    spec = SimpleNamespace(cache=attention_cache((0,), 2, 16), model_type="any")
    meter = KVMeter(spec, ReferenceBackend(), pool)  # type: ignore[arg-type]
    meter.write(keys, case.v[0], case.cache, case.tables)
    meter.attend(case.q_THD, case.cache, case.tables, case.ctx, 0.25)

    def error(scale: float) -> float:
        """Squares of what rounding adds to scores, less what it adds for all keys alike."""
        off = ((keys / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale - keys).double()
        queries = case.q_THD.double().view(200, 2, 2, 16)
        scores = torch.einsum("tugd,sud->ugts", queries, off)
        return (scores - scores.mean(-1, keepdim=True)).square().sum().item()

    found = meter.scales()[0].k
    least = keys.abs().max().item() / 448
    assert least <= found < 2 * least
    assert error(found) <= min(error(least * 2 ** (i / 37)) for i in range(37)) * 1.1
    assert abs(math.log2(found) * STEPS - round(math.log2(found) * STEPS)) < 1e-4


def test_what_cannot_be_measured_is_refused(llama: Path, calibrated: Path) -> None:
    with LLM(calibrated, dtype="float32", kv_dtype=FP8, kv_cache_memory_bytes=4 << 20) as llm:
        with pytest.raises(ConfigError, match="measured with a KV cache of the model's own dtype"):
            llm.calibrate_kv([[1, 2, 3]])
        assert llm.generate([[1, 2, 3]])[0].outputs[0].token_ids
