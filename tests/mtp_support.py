"""Random checkpoints with a multi-token-prediction layer, and transformers' own such layer as their judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_deepseek_v3, make_qwen3_5
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from common.engine.build import BuiltEngine
from common.engine.sequence import Sequence as Sequence_

ALWAYS = -10.0  # a cost below any share of right drafts
MTP = {"method": "mtp", "num_speculative_tokens": 3}


def make_mtp(folder: Path, seed: int = 0, make: Callable[..., Path] = make_deepseek_v3, **overrides: Any) -> Path:
    """A checkpoint of `make` with a multi-token-prediction layer behind its layers, in fp32."""
    make(folder, seed, **(overrides | {"num_nextn_predict_layers": 1}))
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed + 1000)
    layer = MtpModel(main, 1).layers[0].float()
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.2)
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    for name, tensor in layer.state_dict().items():
        ours = name.removeprefix("mtp_block.")
        tensors[prefix + ("shared_head.norm.weight" if ours == "post_norm.weight" else ours)] = tensor
    tensors[prefix + "embed_tokens.weight"] = main.model.embed_tokens.weight.detach().clone()
    tensors[prefix + "shared_head.head.weight"] = main.lm_head.weight.detach().clone()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_qwen_mtp(folder: Path, seed: int = 0, make: Callable[..., Path] = make_qwen3_5, **overrides: Any) -> Path:
    """A checkpoint of `make` with a multi-token-prediction layer under the names of Qwen3-Next, in fp32."""
    make(folder, seed, **overrides)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    layer = _attending_layer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    size = layer.input_layernorm.weight.shape[0]
    shapes = {f"layers.0.{name}": tensor.shape for name, tensor in layer.state_dict().items()}
    shapes |= {f"{name}.weight": (size,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    shapes["fc.weight"] = (size, 2 * size)
    torch.manual_seed(seed + 1000)
    for name, shape in shapes.items():
        tensor = torch.randn(shape) * (0.1 if "norm" in name else 0.2)
        if "experts.gate_up_proj" in name or "experts.down_proj" in name:
            tensors |= _by_expert(f"mtp.{name}", tensor)
        else:
            tensors[f"mtp.{name}"] = tensor
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    return folder


def _by_expert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As Qwen3-Next keeps them."""
    stem, part = name.rsplit(".", 1)
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    return {
        f"{stem}.{expert}.{own}.weight": half
        for expert, whole in enumerate(tensor)
        for own, half in zip(names, whole.chunk(len(names)), strict=True)
    }


def _attending_layer(main: Any) -> Any:
    """A layer of the model's own kind that attends, with weights to be filled."""
    return type(main.model.layers[0])(main.config, main.config.layer_types.index("full_attention")).float().eval()


def zero_centred(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm by 1 + w."""
    return x_TD * (x_TD.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight_D)


Next = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows of the layer [1, T, D] from rows before, positions and tokens."""


@functools.cache
def reference_rows(folder: Path) -> tuple[Any, Next]:
    """The model in fp32, and its layer."""
    if not any(name.startswith("mtp.") for name in load_file(folder / "model.safetensors")):
        main, mtp = reference(folder)
        return main, lambda rows, positions, ids: mtp.forward_layer(0, rows, positions, None, input_ids=ids)
    return qwen_reference(folder)


def qwen_reference(folder: Path) -> tuple[Any, Next]:
    """The layer as the releases describe it, around a decoder layer of transformers, which has no such layer."""
    main: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    own = {name.removeprefix("mtp."): t for name, t in tensors.items() if name.startswith("mtp.")}
    layer, prefix = _attending_layer(main), "layers.0."
    parts = {name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)}
    layer.load_state_dict({name: _tensor(name, parts, t.shape) for name, t in layer.state_dict().items()})
    eps = main.config.rms_norm_eps

    def rows_of(rows: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        embeds = zero_centred(main.model.embed_tokens(ids), own["pre_fc_norm_embedding.weight"], eps)
        before = zero_centred(rows, own["pre_fc_norm_hidden.weight"], eps)
        x = torch.cat([embeds, before], dim=-1) @ own["fc.weight"].T
        mask = torch.full((1, 1, x.shape[1], x.shape[1]), float("-inf")).triu(1)
        turns = main.model.rotary_emb(x, positions[None] if main.config.model_type.startswith("qwen3_5") else positions)
        out = layer(x, position_embeddings=turns, attention_mask=mask)
        return zero_centred(out[0] if isinstance(out, tuple) else out, own["norm.weight"], eps)

    return main, rows_of


@functools.cache
def reference(folder: Path) -> tuple[PreTrainedModel, MtpModel]:
    """The model in fp32, and its multi-token-prediction layer.

    What transformers has for loading such a layer knows the releases' numbers of layers alone, so names are turned
    here.
    """
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    tensors = load_file(folder / "model.safetensors")
    ours = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
    mtp = MtpModel(main, 1).float().eval()
    wanted = mtp.layers[0].state_dict()
    found = {name: _tensor(name, ours, shape.shape) for name, shape in wanted.items()}
    mtp.layers[0].load_state_dict(found)
    return main, mtp


def _tensor(name: str, ours: dict[str, Tensor], shape: torch.Size) -> Tensor:
    name = "shared_head.norm.weight" if name == "post_norm.weight" else name.removeprefix("mtp_block.")
    if name in ours:
        return ours[name]
    stem, part = name.rsplit(".", 1)
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    return torch.stack([torch.cat([ours[f"{stem}.{e}.{p}.weight"] for p in parts]) for e in range(shape[0])])


@torch.inference_mode()
def draft_logits(folder: Path, tokens: Sequence[int], drafts: Sequence[int] = ()) -> Tensor:
    """Scores of the token behind `tokens` and `drafts`, by the layer: [vocab].

    Rows behind `tokens` are chained: each draft's is made from that of the token before it.
    """
    main, rows_of = reference_rows(folder)
    ids = torch.tensor([[*tokens, *drafts]])
    rows = main.model(ids[:, : len(tokens)], use_cache=False).last_hidden_state[:, :-1]
    for count in range(len(drafts) + 1):
        end = len(tokens) + count
        out = rows_of(rows, torch.arange(1, end)[None], ids[:, 1:end])
        rows = torch.cat([rows, out[:, -1:]], dim=1)
    return main.lm_head(rows[0, -1])


@dataclass
class Draft:
    """One draw of a draft: what was known, and the scores it was drawn from."""

    seq: Sequence_
    num_tokens: int
    drafts: tuple[int, ...]
    logits_V: Tensor

    def error(self, folder: Path) -> float:
        """The largest difference from the reference."""
        want = draft_logits(folder, self.seq.token_ids[: self.num_tokens], self.drafts)
        return (want - self.logits_V).abs().max().item()


class DraftWatch:
    """Every draft that an engine draws. `always`: they are wanted at every step, whatever comes of them.

    `known`: what is drawn in place of the layer's choice, by the tokens before it; None for that choice.
    """

    def __init__(
        self, built: BuiltEngine, *, always: bool = True, known: Callable[[Sequence[int]], int | None] = lambda _: None
    ) -> None:
        self.drafts: list[Draft] = []
        self._known = known
        parts = built.parts
        assert parts.drafting is not None
        assert parts.speculator is not None
        if always:
            parts.speculator._cost = ALWAYS
        self._drafting, self._runner = parts.drafting, parts.drafting._model
        self._draw = self._runner._draw  # type: ignore[attr-defined]
        self._runner._draw = self._on_draw  # type: ignore[attr-defined]

    def _on_draw(self, rows_RD: Tensor, rows: Any, going: Any, drafts: Any) -> Any:
        logits_RV = self._runner._model.draft_logits(rows_RD)  # type: ignore[attr-defined]
        for logits_V, i in zip(logits_RV, going, strict=True):
            end = rows[i].start + len(rows[i].token_ids)
            self.drafts.append(Draft(rows[i].seq, end, tuple(drafts[i]), logits_V.clone()))
        drawn = self._draw(rows_RD, rows, going, drafts)
        better = [self._known([*rows[i].seq.token_ids, *drafts[i]]) for i in going]
        return [own if token is None else token for own, token in zip(drawn, better, strict=True)]
