"""What a model's shape alone says: bytes that a decode step reads, operations that a prompt takes. Pure.

The limit of a step is all weights and the KV of its sequences over the bandwidth of a copy, as the figures that we are
compared with have it; embedding rows that a step does not read are in it, and `embedding_nbytes` says how much they
are. Of a mixture the experts that a batch is expected to reach count: E (1 - (1 - k/E)^B) of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
BF16 = 2


@dataclass(frozen=True)
class Shape:
    """Elements of one model's weights. `attention` and the others are of one layer; `qk_dim`, `v_dim` of one head."""

    config: Config
    attention: int
    dense_mlp: int
    expert: int
    shared: int
    num_experts: int
    top_k: int
    num_layers: int
    num_dense: int
    num_heads: int
    qk_dim: int
    v_dim: int
    kv_elements: int  # cached for a token in a layer
    embedding: int
    tied: bool

    @classmethod
    def of(cls, c: Config) -> Shape:
        hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
        experts = c.get("num_experts") or c.get("n_routed_experts") or 0
        width = c.get("moe_intermediate_size", 0)
        if "kv_lora_rank" in c:
            latent, rope, nope, v_dim = (
                c[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            )
            qk_dim, rank = nope + rope, c.get("q_lora_rank") or 0
            queries = hidden * rank + rank * heads * qk_dim if rank else hidden * heads * qk_dim
            attention = queries + hidden * (latent + rope) + latent * heads * (nope + v_dim) + heads * v_dim * hidden
            kv_elements = latent + rope
        else:
            qk_dim = v_dim = c["head_dim"]
            kv_elements = 2 * c["num_key_value_heads"] * qk_dim
            attention = 2 * hidden * heads * qk_dim + hidden * kv_elements
        return cls(
            config=c,
            attention=attention,
            dense_mlp=3 * hidden * c["intermediate_size"],
            expert=3 * hidden * width,
            shared=3 * hidden * width * c.get("n_shared_experts", 0) + hidden * experts,
            num_experts=experts,
            top_k=c.get("num_experts_per_tok", 0),
            num_layers=layers,
            num_dense=c.get("first_k_dense_replace", 0) if experts else layers,
            num_heads=heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            kv_elements=kv_elements,
            embedding=hidden * c["vocab_size"],
            tied=c["tie_word_embeddings"],
        )

    def layers(self, experts_each: float) -> float:
        """Elements of all layers with so many experts of each mixture."""
        mixtures = self.num_layers - self.num_dense
        mlps = self.num_dense * self.dense_mlp + mixtures * (self.shared + experts_each * self.expert)
        return self.num_layers * self.attention + mlps

    @property
    def weights(self) -> float:
        return self.layers(self.num_experts) + self.embedding * (1 if self.tied else 2)

    @property
    def embedding_nbytes(self) -> int:
        """Of rows that a step looks up and does not read whole."""
        return 0 if self.tied else self.embedding * BF16

    def experts_reached(self, num_tokens: int) -> float:
        """How many experts of a mixture `num_tokens` tokens are expected to reach where routing is random."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** num_tokens)


def step_nbytes(c: Config, batch: int, context: float, weight_nbytes: float = BF16, kv_nbytes: float = BF16) -> float:
    """Bytes of the weights and the KV that a step of `batch` sequences at `context` tokens reads."""
    shape = Shape.of(c)
    weights = shape.layers(shape.experts_reached(batch)) + shape.embedding * (1 if shape.tied else 2)
    return weights * weight_nbytes + batch * context * shape.kv_elements * shape.num_layers * kv_nbytes


def prompt_flops(c: Config, num_tokens: int) -> float:
    """Of one prompt, causal; the head computes one row."""
    shape = Shape.of(c)
    attention = num_tokens * num_tokens * shape.num_heads * (shape.qk_dim + shape.v_dim) * shape.num_layers
    return 2.0 * shape.layers(shape.top_k) * num_tokens + attention + 2.0 * shape.embedding
