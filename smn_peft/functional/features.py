# SPDX-License-Identifier: Apache-2.0
"""Features and labels: checks, k-nearest neighbours, PCA whitening."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_RELATIVE_RANK = 1e-6  # below, a singular value is the rounding of fp32 features, and dividing by it gives noise


def require_finite_rows(features: Tensor, what: str) -> None:
    """Raise ValueError if a row of features (n, dim) holds NaN or infinity; `what` names the features."""
    bad = ~torch.isfinite(features).all(dim=1)
    if bool(bad.any()):
        rows = bad.nonzero().squeeze(1)
        found = f"{len(rows)} of {len(features)} rows hold NaN or infinity, the first is row {int(rows[0])}"
        fix = "extract in fp32 (no autocast), or train at lower learning rates"
        raise ValueError(f"{what}: {found}. The model diverged or overflowed: {fix}.")


def whole_numbers(values: Any, where: str, what: str = "label") -> Tensor:
    """Convert labels or indices, of any kind and shape, to int64 without changing any.

    ValueError if they are no numbers, or one is not whole (1 - 1e-9, NaN) or does not fit int64; it names them by
    `where` they belong and `what` one of them is.
    """
    try:
        if not isinstance(values, Tensor):
            array = np.asarray(values)  # torch would make fp32 of a list of floats
            if array.dtype.kind not in "iufb":
                raise ValueError(f"they are {array.dtype}")  # text, objects
            values = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
        found: Tensor = values
        whole = found.to(torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: every {what} must be a whole number: {error}.") from error
    if found.is_floating_point():
        wrong = (found != found.round()) | ~(found.abs() < 2.0**63)
    elif found.dtype == torch.uint64:
        wrong = whole < 0  # beyond int64 it comes back negative
    else:
        return whole
    if bool(wrong.any()):
        index = int(wrong.flatten().nonzero()[0, 0])
        value = found.flatten()[index].item()
        raise ValueError(f"{where}: {what} {value!r} (number {index}) is no whole number.")
    return whole


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Compute each class's share of the votes of the k nearest training samples, as in DINO (section 5 of the paper).

    Cosine similarity s votes with exp(s / temperature). Neighbours are exact; among equal similarities at the border
    of the k nearest, which one votes is up to the device. Memory: `chunk` × `chunk` similarities and `chunk` × 2 k
    neighbours beside the features.

    Args:
        train_features: (train, dim) of any length; rows are L2-normalised here.
        train_labels: (train,), from 0.
        features: (n, dim), the samples to classify.
        k: Number of neighbours; all training samples where there are fewer.
        temperature: Smaller gives the nearest more weight.
        num_classes: Number of columns; by default the largest label plus 1.
        chunk: Rows of either side that are compared at a time.

    Returns:
        fp32 (n, num_classes) on the device of `features`; rows sum to 1.

    Raises:
        ValueError: Shapes, labels, k, temperature or chunk that make no sense, or features that are not finite.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k must be at least 1, got {k}, and chunk must be, got {chunk}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; the paper's is 0.1.")
    classes = _check_samples(train_features, train_labels, features, num_classes)
    device = train_features.device
    labels = whole_numbers(train_labels, "k-NN").to(device)
    parts = []
    with torch.autocast(device.type, enabled=False):  # similarities in bf16 would tie
        train = F.normalize(train_features.float(), dim=1)
        for part in features.split(chunk):
            rows = F.normalize(part.to(device).float(), dim=1)
            similarity, neighbours = _nearest(rows, train, min(k, len(train)), chunk)
            # Relative to the nearest one: exp(s / temperature) itself overflows at small temperatures.
            weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[neighbours], weights)
            parts.append((votes / weights.sum(dim=1, keepdim=True)).to(features.device))
    return torch.cat(parts) if parts else features.new_zeros(0, classes, dtype=torch.float32)


def _nearest(rows: Tensor, train: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices, (rows, k) each, of the most similar training rows, seen a chunk at a time."""
    similarity = rows.new_empty(len(rows), 0)
    neighbours = torch.empty_like(similarity, dtype=torch.int64)
    for start in range(0, len(train), chunk):
        block = rows @ train[start : start + chunk].T
        found, index = block.topk(min(k, block.shape[1]), dim=1)
        similarity, neighbours = torch.cat([similarity, found], 1), torch.cat([neighbours, index + start], 1)
        if similarity.shape[1] > k:
            similarity, order = similarity.topk(k, dim=1)
            neighbours = neighbours.gather(1, order)
    return similarity, neighbours


def _check_samples(train: Tensor, labels: Tensor, features: Tensor, num_classes: int | None) -> int:
    """Return the number of classes."""
    if train.ndim != 2 or features.ndim != 2 or train.shape[1] != features.shape[1]:
        raise ValueError(
            f"Features must be (n, dim) with one dim for both; got {tuple(train.shape)} to learn from and "
            f"{tuple(features.shape)} to classify. Extract both with the same model."
        )
    if not len(train):
        raise ValueError("There are no training features: k-NN needs at least one labelled sample.")
    if labels.shape != train.shape[:1] or labels.is_floating_point():
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"train_labels must hold one integer per training sample, ({len(train)},); got {found}.")
    lowest, highest = int(labels.min()), int(labels.max())
    classes = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        fix = "leave num_classes out, or drop the samples without a label"
        raise ValueError(f"Labels run from {lowest} to {highest}, outside of 0 … {classes - 1}: {fix}.")
    require_finite_rows(train, "Training features")
    require_finite_rows(features, "Features to classify")
    return classes


@dataclass(frozen=True, eq=False)
class Whitening:
    """A projection onto principal components, each divided by its singular value: ``diag(1/S) Vᵀ (x − mean)``.

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
        """Project features (n, dim) of any float dtype to fp32 (n, out), computing in fp64.

        With `unit_variance` they are multiplied by sqrt(samples − 1), as by scikit-learn's ``PCA(whiten=True)``;
        without it the columns of the fit's features have length 1, as in the paper. `chunk` rows are held at a time.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            got = f"got {tuple(features.shape)}. Extract both with the same models."
            raise ValueError(f"This whitening was fitted on features of dim {len(self.mean)}; {got}")
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
        features: (n, dim), n ≥ 2, finite and not all the same, else ValueError.
        components: Number of components to keep, the largest first; None keeps all. Where the features have fewer, so
            many are kept, and a warning says so.
        chunk: Rows at a time: bounds the memory.
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
        fix = "the model has collapsed. Look at its k-NN accuracy, and train it at a lower learning rate."
        raise ValueError(f"All {len(features)} features are the same to rounding, with nothing to whiten: {fix}")
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
