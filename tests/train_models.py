"""Train the model that speculation is judged on: a small DeepSeek-V3 (MLA, experts, an MTP layer) on a formal language.

    sentences -> trunk and MTP layer trained together -> a checkpoint folder with the names of DeepSeek's releases

Speculation on random weights says nothing: drafts are right by chance only. The language here has what makes drafts
of real text succeed, and what makes them fail: words are spelled letter by letter (certain once begun), the next
word mostly follows from the last one, brackets of three kinds nest and must close in their order (certain, but
only by looking back), and now and then the sentence takes a turn that cannot be foreseen.

One thread, fixed seeds, under three minutes. The result is committed, so no test trains:

    make train-test-models      (python tests/train_models.py FOLDER)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

FOLDER = Path(__file__).parent / "data" / "mtp-dyck"
SEED = 20261125
LENGTH, BATCH, STEPS, THREADS = 128, 16, 200, 1
PEAK_LR, WARMUP = 4e-3, 20
MTP_WEIGHTS = (0.6, 0.4, 0.2)  # of the loss of drafts one, two and three tokens ahead

EOS, BOS, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))
SPACE = "\u0120"  # byte-level BPE's space


@dataclass(frozen=True)
class Language:
    """Words, and for each word those that may follow it, the likeliest first."""

    words: tuple[str, ...]
    followers: tuple[tuple[int, ...], ...]

    @classmethod
    def make(cls, seed: int, num_words: int = 48, num_followers: int = 4) -> Language:
        rng = random.Random(seed)
        words: set[str] = set()
        while len(words) < num_words:
            words.add("".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 7))))
        followers = tuple(tuple(rng.sample(range(num_words), num_followers)) for _ in range(num_words))
        return cls(tuple(sorted(words)), followers)

    def sentence(self, rng: random.Random, num_chars: int) -> str:
        """Words with brackets around some of them; all brackets are closed at the end."""
        out: list[str] = []
        open_kinds: list[int] = []
        word, since = rng.randrange(len(self.words)), 0
        while sum(map(len, out)) < num_chars:
            since += 1
            if open_kinds and since >= 3:  # a bracket holds three words or brackets
                out.append(BRACKETS[open_kinds.pop()][1])
                since = 1
            elif len(open_kinds) < 3 and rng.random() < 0.12:
                open_kinds.append(rng.randrange(3))
                out.append(BRACKETS[open_kinds[-1]][0])
                since = 0
            else:
                out.append(self.words[word] + " ")
                word = rng.choices(self.followers[word], (0.9, 0.06, 0.03, 0.01))[0]
        out.extend(BRACKETS[kind][1] for kind in reversed(open_kinds))
        return "".join(out) + "."


def make_tokenizer() -> Tokenizer:
    """A token for each character of the language: byte-level BPE with no merges."""
    characters = [*LETTERS, *(c for pair in BRACKETS for c in pair), ".", SPACE]
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    return tokenizer


def make_config(vocab_size: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def batches(language: Language, tokenizer: Tokenizer, seed: int) -> Any:
    """int64 [BATCH, LENGTH] without end: sentences one after the other, each begun by BOS and ended by EOS."""
    rng = random.Random(seed)
    stream: list[int] = []
    while True:
        while len(stream) < BATCH * LENGTH:
            stream += [1, *tokenizer.encode(language.sentence(rng, rng.randint(40, 160))).ids, 2]
        yield torch.tensor(stream[: BATCH * LENGTH]).view(BATCH, LENGTH)
        del stream[: BATCH * LENGTH]


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def losses(trunk: DeepseekV3ForCausalLM, mtp: MtpModel, ids_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Next-token loss, and the MTP layer's for one, two and three tokens further on.

    A draft reads the row before it (the trunk's after the final norm, then its own after its norm) and the
    embedding of the token that follows; further drafts chain the one layer (DeepSeek-V3 report, section 2.2).
    """
    hidden = trunk.model(ids_BT, use_cache=False).last_hidden_state
    next_loss = cross_entropy(trunk.lm_head(hidden[:, :-1]), ids_BT[:, 1:])
    draft_losses = []
    for depth in range(1, len(MTP_WEIGHTS) + 1):
        inputs = ids_BT[:, depth:-1]
        positions = torch.arange(depth, ids_BT.shape[1] - 1)[None]
        hidden = mtp.forward_layer(0, hidden[:, : inputs.shape[1]], positions, None, input_ids=inputs)
        draft_losses.append(cross_entropy(trunk.lm_head(hidden), ids_BT[:, depth + 1 :]))
        hidden = hidden[:, :-1]
    return next_loss, draft_losses


def train(trunk: DeepseekV3ForCausalLM, mtp: MtpModel, source: Any) -> None:
    own = {id(p): p for p in (*trunk.parameters(), *mtp.parameters())}
    optimizer = torch.optim.AdamW(own.values(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, max(0.02, (STEPS - step) / (STEPS - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.monotonic()
    for step in range(STEPS):
        next_loss, draft_losses = losses(trunk, mtp, next(source))
        total = next_loss + sum(w * loss for w, loss in zip(MTP_WEIGHTS, draft_losses, strict=True))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 39:
            drafts = " ".join(f"{loss.item():.3f}" for loss in draft_losses)
            print(
                f"step {step + 1}: {next_loss.item():.3f}, drafts {drafts}, {time.monotonic() - began:.0f} s",
                flush=True,
            )


def released_names(trunk: DeepseekV3ForCausalLM, mtp: MtpModel) -> dict[str, Tensor]:
    """All tensors in bfloat16 under DeepSeek-V3's names; the MTP layer is layer `num_hidden_layers`."""
    layer = f"model.layers.{trunk.config.num_hidden_layers}."
    renamed = dict(trunk.state_dict())
    for name, tensor in mtp.layers[0].state_dict().items():
        own = name.removeprefix("mtp_block.") if name.startswith("mtp_block.") else name
        renamed[layer + ("shared_head.norm.weight" if name == "post_norm.weight" else own)] = tensor
    renamed[layer + "embed_tokens.weight"] = trunk.model.embed_tokens.weight
    renamed[layer + "shared_head.head.weight"] = trunk.lm_head.weight
    out: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for i, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                out[f"{stem}{i}.gate_proj.weight"] = gate.to(dtype).clone()
                out[f"{stem}{i}.up_proj.weight"] = up.to(dtype).clone()
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out |= {f"{stem}{i}.down_proj.weight": t.to(dtype).clone() for i, t in enumerate(tensor)}
        else:
            out[name] = tensor.detach().to(dtype).clone()
    return out


def make(folder: Path) -> Path:
    """Train and write the folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer.get_vocab_size())
    trunk = DeepseekV3ForCausalLM(config).train()
    mtp = MtpModel(trunk, 1).train()
    train(trunk, mtp, batches(Language.make(SEED), tokenizer, SEED))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(released_names(trunk, mtp), folder / "model.safetensors", {"format": "pt"})
    plain = config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
    plain |= {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": BOS, "pad_token": PAD}
    about |= {"add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="train the small MTP model (one thread, under three minutes)")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    args = parser.parse_args()
    began = time.monotonic()
    folder = make(args.folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.1f} MB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
