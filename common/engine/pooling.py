"""From the last token's hidden row to the vector that a client gets. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEAST_NORM = 1e-12  # as torch.nn.functional.normalize has it


def pooled_vector(hidden_D: NDArray[np.float32], dimensions: int, *, normalizes: bool) -> NDArray[np.float32] | None:
    """The first `dimensions` elements (0: all), scaled to length 1 if the model does; None if they are no numbers.

    Cut before it is scaled: of a model that normalises this is its whole vector, cut and scaled again, as is meant for
    shorter vectors of one model (Kusupati et al. 2022, Matryoshka representation learning).
    """
    vector_D = hidden_D[: dimensions or None]
    if not np.isfinite(vector_D).all():
        return None
    if not normalizes:
        return vector_D
    norm = float(np.linalg.norm(vector_D.astype(np.float64)))
    return (vector_D / max(norm, _LEAST_NORM)).astype(np.float32)
