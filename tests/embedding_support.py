"""Vectors by transformers: what an embedding checkpoint of the tests gives in fp32."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

TOLERANCE = 2e-5  # of elements of vectors of length 1, in fp32


@functools.cache
def _oracle(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def reference_vector(folder: Path, token_ids: Sequence[int], *, normalize: bool = True) -> NDArray[np.float32]:
    """The last hidden state at the last token, [hidden]."""
    with torch.inference_mode():
        hidden_TD = _oracle(folder)(torch.tensor([list(token_ids)])).last_hidden_state[0]
        vector_D = hidden_TD[-1]
        if normalize:
            vector_D = torch.nn.functional.normalize(vector_D, dim=0)
    found: NDArray[np.float32] = vector_D.numpy()
    return found


def cut(vector_D: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first elements, scaled to length 1 again."""
    part: NDArray[np.float32] = vector_D[:dimensions]
    return part / np.linalg.norm(part)
