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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

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


def make_llama(folder: Path, seed: int = 0, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Llama checkpoint in fp32; `overrides` go into its config. Returns `folder`."""
    return _save(folder, seed, LlamaForCausalLM, LlamaConfig(**(_SIZES | overrides)), max_shard_size)


def make_qwen3(folder: Path, seed: int = 0, *, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Qwen3 checkpoint in fp32; `sliding_window=24, max_window_layers=1` (say) gives it window layers."""
    if "sliding_window" in overrides:
        overrides = {"use_sliding_window": True, "max_window_layers": 1} | overrides
    return _save(folder, seed, Qwen3ForCausalLM, Qwen3Config(**(_SIZES | overrides)), max_shard_size)


def _save(folder: Path, seed: int, model_class: type[PreTrainedModel], config: Any, max_shard_size: str) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
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
                "model_max_length": config.max_position_embeddings,
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


def main() -> None:
    parser = argparse.ArgumentParser(description="make a tiny random checkpoint")
    parser.add_argument("family", choices=("llama", "qwen3"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make = make_llama if args.family == "llama" else make_qwen3
    print(make(args.folder, args.seed))


if __name__ == "__main__":
    main()
