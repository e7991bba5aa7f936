# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp: soft assignments of a batch to prototypes that use every prototype equally (Caron et al. 2020).

The iteration runs on logarithms, so that no epsilon and no range of scores gives 0/0. All processes of a distributed
run share one assignment: the sums over the batch run over the joined batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import all_reduce

__all__ = ["sinkhorn"]


def _log_sum_over_batch(logits: Tensor) -> Tensor:
    """(batch, prototypes) -> (1, prototypes): log Σ exp over the rows of all processes."""
    top = all_reduce(logits.amax(0, keepdim=True), "max")
    return top + all_reduce((logits - top).exp_().sum(0, keepdim=True)).log_()


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes of a batch: ``exp(scores / ε)`` with columns, then rows normalised in turn (SwAV, section 3.1).

    The last normalisation is that of the rows. Every process must call this; the number of rows may differ.

    Args:
        scores: Similarity of each embedding to each prototype, (batch, prototypes), any float dtype.
        epsilon: Strength ε of the entropy term; the smaller, the harder the codes.
        iterations: Number of times that columns and rows are normalised.

    Returns:
        Codes (batch, prototypes) of this process's rows, fp32 also under autocast, without gradient; each row sums
        to 1.

    Raises:
        ValueError: If `scores` is not a (batch, prototypes) matrix with entries, `epsilon` is not above 0, or
            `iterations` is below 1.
    """
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"sinkhorn takes scores (batch, prototypes) with entries, got {tuple(scores.shape)}.")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}: SwAV takes 0.05.")
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}: without any the codes would not sum to 1.")
    logits = scores.float() / epsilon  # fp32: the exponent of a bf16 score would be wrong by its rounding
    for _ in range(iterations):
        logits = logits - _log_sum_over_batch(logits)
        logits = logits.log_softmax(1)
    return logits.exp_()
