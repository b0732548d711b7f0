"""Small real tokenizers, trained on a fixed text: one per decoder family that checkpoints use."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today?",
    "Why is the sky blue? Because molecules scatter blue light more than red light.",
    "Zażółć gęślą jaźń, naïve café, 你好世界, こんにちは, Привет мир, 🙂🚀👨‍👩‍👧",
    "def add(a, b):\n    return a + b\n\n\n{'json': [1, 2, 3]}\t<b>bold</b>",
] * 30

CHAT_TEMPLATE = (
    "{{ bos_token if bos_token is defined }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_level() -> RawTokenizer:
    """As Llama 3, Qwen and DeepSeek have it."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens([AddedToken("<think>", special=False), AddedToken("<two words>", special=False)])
    return raw


@cache
def byte_fallback() -> RawTokenizer:
    """As Llama 2 and Mistral have it: SentencePiece BPE, byte tokens, a leading space stripped."""
    trained = RawTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]],
        limit_alphabet=40,
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    spec = json.loads(trained.to_str())
    for token in spec["added_tokens"]:  # byte tokens are ordinary ones
        token["special"] = token["id"] < 3
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["special"]]
    raw = RawTokenizer.from_str(json.dumps(spec))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return raw


@cache
def word_piece() -> RawTokenizer:
    """A decoder that no byte table describes."""
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return raw


def write_checkpoint(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, **generation: object) -> Path:
    """The text part of a checkpoint folder, byte level."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
