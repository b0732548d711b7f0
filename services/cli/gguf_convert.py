"""A GGUF file of the llama architecture as a Hugging Face folder: safetensors (bf16), configs, tokenizer.

Weights are dequantised one at a time and written through, so memory stays at one tensor. llama.cpp stores the
rows of q_proj and k_proj in pairs (i, i + D/2 side by side), for its own way of turning them; they are put
back. No torch: bf16 is the upper half of a float32, rounded to nearest even.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import ConfigError

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all), after each tensor."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # tokenizer.ggml.token_type


def convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write the checkpoint into `folder`, which exists. ConfigError if the file is of another kind."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(key) != wanted:
            raise ConfigError(f"{gguf.name}: {key} is {fields.get(key)!r}, only {wanted!r} is converted")
    names = {hf_name(t.name) for t in reader.tensors}
    _write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in names))
    ids = {k: fields[f"tokenizer.ggml.{v}_token_id"] for k, v in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    _write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in ids.items()})
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    heads = (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])
    _write_weights(folder / "model.safetensors", list(reader.tensors), heads, progress)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, part, kind = name.split(".")
    if part not in _NAMES or (block and block[0] != "blk"):
        raise ConfigError(f"tensor {name} has no place in a Llama checkpoint")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[part]}.{kind}"


def unpermute(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of the rows in a head: pairs (i, i + D/2) back to two halves."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bf16, ties to even; values must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, control tokens are special."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{word}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for word, name in named},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_weights(path: Path, tensors: list[ReaderTensor], heads: tuple[int, int], progress: Progress) -> None:
    """safetensors: 8 bytes of header length, the header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + 2 * int(t.n_elements)
        shape = [int(n) for n in reversed(t.shape)]
        header[hf_name(t.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little"))
        f.write(encoded)
        done = 0
        for t in tensors:
            values = dequantize(t.data, t.tensor_type)
            part = t.name.split(".")[-2]
            if part in ("attn_q", "attn_k"):
                values = unpermute(values, heads[part == "attn_k"])
            f.write(to_bfloat16(values).tobytes())
            done += 2 * int(t.n_elements)
            progress(done, end)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
