# SPDX-License-Identifier: Apache-2.0
"""The router: which expert an image goes to, by a Gaussian mixture or k-means on the dispatcher's features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.features import Whitening, fit_whitening
from .folder import WHITENING, read_json, read_tensors, read_whitening, whitening_tensors, write_json, write_tensors

__all__ = ["ROUTER_NAME", "ROUTER_TENSORS_NAME", "Router", "check_clusters", "fit_router"]

ROUTER_NAME = "router.json"
ROUTER_TENSORS_NAME = "router.safetensors"
_SHAPES: dict[str, dict[str, tuple[str | int, ...]]] = {
    "gmm": {**WHITENING, "weights": ("K",), "means": ("K", "d"), "precisions_cholesky": ("K", "d", "d")},
    "kmeans": {**WHITENING, "means": ("K", "d")},
}


@dataclass(frozen=True, eq=False)
class Router:
    """Features -> number of the expert; needs scikit-learn to be fitted, not to be used.

    Attributes:
        kind: "gmm" or "kmeans".
        whitening: Of the L2-normalised features, to d dims of unit variance.
        means: fp64 (K, d).
        weights: fp64 (K,), shares of the components; None for k-means.
        precisions_cholesky: fp64 (K, d, d), P with P Pᵀ the inverse covariance; None for k-means.
        dim: Principal components that were asked for; d where the features have as many.
        seed: Of the clustering.
        sizes: Number of the images of the fit that go to each expert.
    """

    kind: str
    whitening: Whitening
    means: Tensor
    weights: Tensor | None
    precisions_cholesky: Tensor | None
    dim: int
    seed: int
    sizes: tuple[int, ...]

    @property
    def experts(self) -> int:
        """K."""
        return len(self.means)

    def scores(self, features: Tensor) -> Tensor:
        """How well each component fits features (n, F) of the dispatcher: fp64 (n, K), up to a constant.

        Of a mixture the log of weight times density; of k-means −½ the squared distance.
        """
        points = _points(self.whitening, features)
        if self.weights is None or self.precisions_cholesky is None:
            return torch.stack([-0.5 * (points - mean).square().sum(1) for mean in self.means], 1)
        found = []
        for weight, mean, cholesky in zip(self.weights, self.means, self.precisions_cholesky, strict=True):
            distance = ((points - mean) @ cholesky).square().sum(1)
            found.append(weight.log() + cholesky.diagonal().log().sum() - 0.5 * distance)
        return torch.stack(found, 1)

    def assign(self, features: Tensor) -> Tensor:
        """The most likely component, or the nearest centre, of the dispatcher's features (n, F): int64 (n,)."""
        return self.scores(features).argmax(1)

    def save(self, folder: str | Path) -> None:
        """Write ``router.safetensors`` and, when that is whole, ``router.json``."""
        folder = Path(folder)
        tensors = {**whitening_tensors(self.whitening), "means": self.means}
        if self.weights is not None and self.precisions_cholesky is not None:
            tensors |= {"weights": self.weights, "precisions_cholesky": self.precisions_cholesky}
        write_tensors(folder / ROUTER_TENSORS_NAME, tensors)
        facts = {"kind": self.kind, "dim": self.dim, "seed": self.seed, "sizes": list(self.sizes)}
        write_json(folder / ROUTER_NAME, facts)

    @classmethod
    def load(cls, folder: str | Path) -> Router:
        """Read what [`save`] wrote; damaged files are refused."""
        path = Path(folder) / ROUTER_NAME
        facts = read_json(path, {"kind": str, "dim": int, "seed": int, "sizes": list})
        if facts["kind"] not in _SHAPES:
            raise ValueError(f"{path}: kind must be one of {', '.join(_SHAPES)}; it is {facts['kind']!r}.")
        tensors_path = path.with_name(ROUTER_TENSORS_NAME)
        tensors = read_tensors(tensors_path, _SHAPES[facts["kind"]])
        whitening = read_whitening(tensors, tensors_path)
        if len(facts["sizes"]) != len(tensors["means"]):
            raise ValueError(f"{path} has {len(facts['sizes'])} clusters, {tensors_path} {len(tensors['means'])}.")
        precisions = tensors.get("precisions_cholesky")
        if precisions is not None and not bool((precisions.diagonal(dim1=1, dim2=2) > 0).all()):
            raise ValueError(f"{tensors_path}: precisions_cholesky must have positive diagonals: it is damaged.")
        sizes = tuple(int(size) for size in facts["sizes"])
        means, weights = tensors["means"], tensors.get("weights")
        return cls(facts["kind"], whitening, means, weights, precisions, facts["dim"], facts["seed"], sizes)


def _points(whitening: Whitening, features: Tensor) -> Tensor:
    return whitening(F.normalize(features.double(), dim=1), unit_variance=True).double()


def fit_router(features: Tensor, experts: int = 5, *, kind: str = "gmm", dim: int = 20, seed: int = 0) -> Router:
    """Cluster the dispatcher's features of the training images (sections 3.4 and 4.4 of the paper).

    They are L2-normalised, projected to `dim` principal components of unit variance, and clustered: by a Gaussian
    mixture with full covariances, or by k-means. Each is started five times and the likeliest kept.

    Args:
        features: (n, F).
        experts: Number K of clusters.
        kind: "gmm" or "kmeans".
        dim: Principal components; fewer where the features have fewer.
        seed: Of the clustering.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            "A router is fitted by scikit-learn, which is not installed: pip install 'smn_peft[eval]'."
        ) from error
    if kind not in _SHAPES:
        raise ValueError(f"kind must be one of {', '.join(_SHAPES)}; got {kind!r}.")
    if len(features) < experts:
        raise ValueError(f"{len(features)} images cannot make {experts} clusters: take fewer experts, or more images.")
    whitening = fit_whitening(F.normalize(features.double(), dim=1), min(dim, features.shape[1], len(features) - 1))
    points = _points(whitening, features).numpy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        if kind == "gmm":
            model: Any = GaussianMixture(experts, n_init=5, max_iter=500, random_state=seed).fit(points)
            found = {"means": model.means_, "weights": model.weights_, "cholesky": model.precisions_cholesky_}
        else:
            model = KMeans(experts, n_init=5, max_iter=500, random_state=seed).fit(points)
            found = {"means": model.cluster_centers_}
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            warnings.warn(f"The router's clustering did not settle ({warning.message}).", stacklevel=2)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    tensors = {name: torch.as_tensor(part, dtype=torch.float64).contiguous() for name, part in found.items()}
    weights, cholesky = tensors.get("weights"), tensors.get("cholesky")
    router = Router(kind, whitening, tensors["means"], weights, cholesky, dim, seed, (0,) * experts)
    sizes = torch.bincount(router.assign(features), minlength=experts)
    return replace(router, sizes=tuple(sizes.tolist()))


def check_clusters(sizes: Sequence[int], batch_size: int) -> None:
    """Refuse clusters of fewer images than a batch, from which an expert cannot learn."""
    small = [f"cluster {number} has {size}" for number, size in enumerate(sizes) if size < batch_size]
    if small:
        raise ValueError(
            f"Of n={sum(sizes)} training images in K={len(sizes)} clusters {', '.join(small)}, and an expert needs a "
            f"batch of {batch_size} at least: take fewer experts, another router_seed, router='kmeans', or a "
            "smaller batch_size. The dispatcher is done and is not trained again."
        )
