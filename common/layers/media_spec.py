"""What a model takes in place of its own embeddings, as plain data (no torch, so that a model's spec needs none)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaSpec:
    """`placeholder_ids`: tokens whose embedding an image or video frame replaces; they may lie past the vocabulary.

    `num_deepstack`: features that each of its rows brings beside the embedding (Meng et al. 2024): the i-th is added
    to the token's hidden row after layer i. `takes_grid`: a row's place in its image counts in the rotary positions.
    """

    placeholder_ids: tuple[int, ...]
    num_deepstack: int = 0
    takes_grid: bool = False

    def row_width(self, hidden_size: int) -> int:
        """Elements that come for one token: [embedding | features for layer 0 | for layer 1 ...]."""
        return hidden_size * (1 + self.num_deepstack)
