# SPDX-License-Identifier: Apache-2.0
"""PCA whitening by singular values: ``e* = diag(1/S) Vᵀ (e − mean)``, as the cascade's embeddings need it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .finite import require_finite_rows

__all__ = ["Whitening", "fit_whitening"]

_RELATIVE_RANK = 1e-6  # below, a singular value is the rounding of fp32 features, and dividing by it gives noise


@dataclass(frozen=True, eq=False)
class Whitening:
    """A projection onto principal components, each divided by its singular value.

    Attributes:
        mean: fp64 (dim,), subtracted first.
        components: fp32 (out, dim), orthonormal rows Vᵀ, by falling singular value; of each row the entry of the
            largest magnitude is positive. They are as many numbers as a small model has, so not fp64.
        singular_values: fp64 (out,), S of the centred features that it was fitted on.
        samples: Number of these features.
    """

    mean: Tensor
    components: Tensor
    singular_values: Tensor
    samples: int

    def __call__(self, features: Tensor, *, unit_variance: bool = False, chunk: int = 8192) -> Tensor:
        """Project features (n, dim), computing in fp64.

        Args:
            features: Any float type.
            unit_variance: Multiply by sqrt(samples − 1), which gives the features of the fit variance 1 and is
                scikit-learn's ``PCA(whiten=True)``. Without it their columns have length 1, as in the paper.
            chunk: Rows at a time: bounds the memory.

        Returns:
            fp32 (n, out).

        Raises:
            ValueError: If `features` are of another dim.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"This whitening was fitted on features of dim {len(self.mean)}; got {tuple(features.shape)}. Extract "
                "both with the same models."
            )
        scale = math.sqrt(self.samples - 1) if unit_variance else 1.0
        matrix = self.components.double().T * (scale / self.singular_values)
        parts = [(part.double() - self.mean) @ matrix for part in features.split(chunk)]
        return torch.cat([part.float() for part in parts])


@torch.no_grad()
def fit_whitening(features: Tensor, components: int | None = None, *, chunk: int = 8192) -> Whitening:
    """Fit a [`Whitening`] on features (section 3.4 of the paper).

    The paper divides by "eigenvalues"; what gives components equal variance, its purpose, is their square roots, the
    singular values. They come from the fp64 Gram matrix, so that memory does not grow with n. Components whose
    singular value is at most 1e-6 of the largest are dropped: they hold nothing but rounding.

    Args:
        features: (n, dim), n ≥ 2.
        components: Number of components to keep, the largest first; None keeps all. Where the features have fewer, so
            many are kept, and a warning says so.
        chunk: Rows at a time: bounds the memory.

    Raises:
        ValueError: Fewer than two rows, rows that are all the same, values that are not finite, or `components` < 1.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Whitening is fitted on two or more features (n, dim); got {tuple(features.shape)}.")
    if components is not None and components < 1:
        raise ValueError(f"components must be at least 1, or None for all; got {components}.")
    require_finite_rows(features, "Features to whiten")
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(chunk):
        mean += part.double().sum(0)
    mean /= len(features)
    gram = mean.new_zeros(len(mean), len(mean))
    for part in features.split(chunk):
        centred = part.double() - mean
        gram += centred.T @ centred
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp(min=0).sqrt().flip(0)
    if values[0] <= torch.finfo(torch.float32).eps * features.abs().max().double() * math.sqrt(len(features)):
        raise ValueError(
            f"All {len(features)} features are the same to rounding, so there is nothing to whiten: the model has "
            "collapsed. Look at its k-NN accuracy, and train it at a lower learning rate."
        )
    rank = int((values > _RELATIVE_RANK * values[0]).sum())
    if components is not None and rank < components:
        warnings.warn(
            f"{len(features)} features of dim {len(mean)} have {rank} principal components above rounding, fewer than "
            f"the {components} asked for: {rank} are kept.",
            stacklevel=3,
        )
    kept = min(rank, components or rank)
    rows = vectors.T.flip(0)[:kept]
    largest_entry = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows = (rows * largest_entry.sign()).float().contiguous()
    return Whitening(mean, rows, values[:kept].contiguous(), len(features))
