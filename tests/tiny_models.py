"""Small random checkpoints with fixed seeds, made by script: same folder layout as real ones, never downloaded.

Weights are drawn wide (std 0.2), so that the best token wins by a clear margin. The tokenizer is byte-level BPE
trained on the sentences below, with a ChatML template.

    python tests/tiny_models.py llama FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VOCAB_SIZE = 512
EOS, BOS, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the sun sets behind the hills.",
    "Why is the sky blue? Because air scatters short waves of light more than long ones.",
    "A cache keeps what was computed, so that the same prompt need not be computed twice.",
    "Numbers such as 3, 14, 159, 2653 and 58979 are written digit by digit.",
    "def add(first, second):\n    return first + second\n",
    "Où est la bibliothèque? Die Straße ist naß. 今日は良い天気です。 Привет, мир!",
    "Workers send blocks to workers; a router sends tokens to clients.",
)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION_SIZES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}
_KIMI_VISION_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "initializer_range": 0.2,
}
_MOE_SIZES = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_LATENT_SIZES: dict[str, Any] = {key: value for key, value in _SIZES.items() if key != "head_dim"} | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_group": 4,
    "topk_group": 2,
}
_INDEXER_SIZES: dict[str, Any] = {
    "index_n_heads": 16,  # with fewer, sums of ReLUs are often equal, and which position is taken is up to chance
    "index_head_dim": 16,
    "index_topk": 24,
}
_MEDIA_IDS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}


_HYBRID_SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "initializer_range": 0.08,  # the gated norm is sharp: at 0.2 even the reference is not exact to 1e-4
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_HYBRID_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}


def make_llama(folder: Path, seed: int = 0, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Llama checkpoint in fp32; `overrides` go into its config. Returns `folder`."""
    return _save(folder, seed, LlamaForCausalLM, LlamaConfig(**(_SIZES | overrides)), max_shard_size)


def make_qwen3(folder: Path, seed: int = 0, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Qwen3 checkpoint in fp32; `sliding_window=24, max_window_layers=1` (say) gives it window layers."""
    if "sliding_window" in overrides:
        overrides = {"use_sliding_window": True, "max_window_layers": 1} | overrides
    return _save(folder, seed, Qwen3ForCausalLM, Qwen3Config(**(_SIZES | overrides)), max_shard_size)


def make_qwen3_embedding(
    folder: Path, seed: int = 0, *, mode: str = "lasttoken", normalize: bool = True, **overrides: Any
) -> Path:
    """As Qwen3-Embedding is laid out: saved without a head, with the files of sentence-transformers, and a tokenizer
    whose post-processor ends every text with PAD.
    """
    config = Qwen3Config(**{**_SIZES, "tie_word_embeddings": True, **overrides})
    _save(folder, seed, Qwen3Model, config, "5GB")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"architectures": ["Qwen3ForCausalLM"]}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ]
        )
    )
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": config.hidden_size, **modes, "include_prompt": True})
    )
    tokenizer = Tokenizer.from_str(_tokenizer_json())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {PAD}", pair=f"$A $B {PAD}", special_tokens=[(PAD, tokenizer.token_to_id(PAD))]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def make_qwen3_vl(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen3-VL checkpoint in fp32, vision tower included; `overrides` go into its text config.

    `vision`: what goes into the vision config; `tied`: one embedding.
    """
    return _save(folder, seed, Qwen3VLForConditionalGeneration, _with_vision(Qwen3VLConfig, overrides), "5GB")


def make_qwen3_vl_moe(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """The same over Qwen3-MoE."""
    config = _with_vision(Qwen3VLMoeConfig, _MOE_SIZES | overrides)
    return _save(folder, seed, Qwen3VLMoeForConditionalGeneration, config, "5GB")


def make_kimi_k25(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Kimi-K2.5 checkpoint in fp32, vision tower included, under the names of the releases.

    Its placeholders lie past the vocabulary, as one of the releases' does. `overrides` go into the text config.
    """
    config = Kimi_K25Config(
        text_config=_LATENT_SIZES
        | _heads(overrides)
        | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
        | overrides,
        vision_config=_KIMI_VISION_SIZES,
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **_MEDIA_IDS | {"image_token_id": VOCAB_SIZE + 5, "video_token_id": VOCAB_SIZE},
    )
    _save(folder, seed, Kimi_K25ForConditionalGeneration, config, "5GB")
    path = folder / "model.safetensors"
    text = "language_model.model."  # transformers renames the vision tower's layers, and these with them
    renamed = {n.replace(f"{text}blocks.", f"{text}layers."): t for n, t in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})
    config_path = folder / "config.json"
    saved = json.loads(config_path.read_text())
    saved["text_config"]["model_type"] = "kimi_k2"
    config_path.write_text(json.dumps(saved, indent=2))
    return folder


def _with_vision(config_class: Any, overrides: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    vision, tied = overrides.pop("vision", {}), overrides.pop("tied", False)
    return config_class(
        text_config=_SIZES | {"rope_parameters": rope} | overrides,
        vision_config=_VISION_SIZES | vision,
        tie_word_embeddings=tied,
        **_MEDIA_IDS,
    )


def make_qwen3_moe(folder: Path, seed: int = 0, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Qwen3-MoE checkpoint in fp32, all layers mixtures of 8 experts, 3 per token."""
    config = Qwen3MoeConfig(**(_SIZES | _MOE_SIZES | {"norm_topk_prob": True} | overrides))
    return _save(folder, seed, Qwen3MoeForCausalLM, config, max_shard_size)


def make_deepseek_v4(
    folder: Path, seed: int = 0, *, kinds: str = "wch", num_hash: int = 1, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """A DeepSeek-V4 checkpoint in fp32. `kinds`: a letter per layer, a window alone (w), CSA (c) or HCA (h)."""
    types = {"w": "sliding_attention", "c": "compressed_sparse_attention", "h": "heavily_compressed_attention"}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
    sizes = {
        "num_hidden_layers": len(kinds),
        "layer_types": [types[k] for k in kinds],
        "mlp_layer_types": ["hash_moe" if i < num_hash else "moe" for i in range(len(kinds))],
        "num_key_value_heads": 1,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "rope_parameters": yarn,
        "q_lora_rank": 24,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "max_position_embeddings": 1024,
        "pad_token_id": None,  # its embedding would be zero, and all the indexer's scores equal
    }
    config = {k: v for k, v in (_SIZES | sizes | overrides).items() if k != "intermediate_size"}
    return _save(folder, seed, DeepseekV4ForCausalLM, DeepseekV4Config(**config), max_shard_size)


def make_deepseek_v3(folder: Path, seed: int = 0, *, model_type: str = "", **overrides: Any) -> Path:
    """A DeepSeek-V3 checkpoint in fp32: a dense layer, then 8 routed experts and a shared one, in 4 groups.

    `model_type`: written into its config.json, for families that transformers has under no name of their own.
    """
    sizes = _heads(overrides)
    _save(folder, seed, DeepseekV3ForCausalLM, DeepseekV3Config(**(_LATENT_SIZES | sizes | overrides)), "5GB")
    if model_type:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}, indent=2))
    return folder


def make_deepseek_v32(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A DeepSeek-V3.2 checkpoint in fp32: DeepSeek-V3's, and a query sees 24 positions."""
    sizes = _LATENT_SIZES | _INDEXER_SIZES | _heads(overrides)
    return _save(folder, seed, DeepseekV32ForCausalLM, DeepseekV32Config(**(sizes | overrides)), "5GB")


def make_glm_moe_dsa(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A GLM-5 checkpoint in fp32: DeepSeek-V3.2's sizes, one group of experts, values wider than keys."""
    groups = {"n_group": 1, "topk_group": 1, "v_head_dim": 28}
    sizes = _LATENT_SIZES | _INDEXER_SIZES | groups | _heads(overrides)
    return _save(folder, seed, GlmMoeDsaForCausalLM, GlmMoeDsaConfig(**(sizes | overrides)), "5GB")


def _heads(overrides: dict[str, Any]) -> dict[str, Any]:
    """Latent attention has as many key heads as query heads."""
    heads = overrides.get("num_attention_heads")
    return {"num_key_value_heads": heads} if heads else {}


def make_qwen3_next(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen3-Next checkpoint in fp32: delta-net layers and one that attends, all mixtures of experts."""
    config = Qwen3NextConfig(**(_SIZES | _HYBRID_SIZES | _HYBRID_EXPERTS | overrides))
    return _save(folder, seed, Qwen3NextForCausalLM, config, "5GB")


def make_qwen3_5(
    folder: Path, seed: int = 0, *, moe: bool = False, vision: bool = False, tied: bool = False, **overrides: Any
) -> Path:
    """A Qwen3.5 checkpoint in fp32, dense or a mixture of experts; the text model alone, or with a vision tower."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    text = _SIZES | _HYBRID_SIZES | {"rope_parameters": rope} | (_HYBRID_EXPERTS if moe else {}) | overrides
    if moe:
        del text["intermediate_size"]
    if not vision:
        config_class = Qwen3_5MoeTextConfig if moe else Qwen3_5TextConfig
        text_class: Any = Qwen3_5MoeForCausalLM if moe else Qwen3_5ForCausalLM
        return _save(folder, seed, text_class, config_class(**text, tie_word_embeddings=tied), "5GB")
    whole_class = Qwen3_5MoeConfig if moe else Qwen3_5Config
    sizes = {name: value for name, value in _VISION_SIZES.items() if name != "deepstack_visual_indexes"}
    config = whole_class(text_config=text, vision_config=sizes, tie_word_embeddings=tied, **_MEDIA_IDS)
    model_class: Any = Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration
    return _save(folder, seed, model_class, config, "5GB")


def _save(folder: Path, seed: int, model_class: type[PreTrainedModel], config: Any, max_shard_size: str) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("dt_bias"):
                tensor.normal_(-3, 1)  # as trained: most of a state outlives many tokens
            elif name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif name.endswith(("sinks", "base")):
                tensor.normal_(0, 0.5)
            elif "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif name.endswith("tid2eid"):
                num_experts = config.n_routed_experts
                tensor.copy_(torch.rand(tensor.shape[0], num_experts).argsort(-1)[:, : tensor.shape[1]])
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": EOS,
                "bos_token": BOS,
                "pad_token": PAD,
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.get_text_config().max_position_embeddings,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
    )
    return folder


@functools.cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


MAKERS = {
    "deepseek_v3": make_deepseek_v3,
    "deepseek_v32": make_deepseek_v32,
    "glm_moe_dsa": make_glm_moe_dsa,
    "kimi_k25": make_kimi_k25,
    "llama": make_llama,
    "qwen3": make_qwen3,
    "qwen3_embedding": make_qwen3_embedding,
    "qwen3_moe": make_qwen3_moe,
    "qwen3_next": make_qwen3_next,
    "qwen3_5": make_qwen3_5,
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "deepseek_v4": make_deepseek_v4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="make a tiny random checkpoint")
    parser.add_argument("family", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(MAKERS[args.family](args.folder, args.seed))


if __name__ == "__main__":
    main()
