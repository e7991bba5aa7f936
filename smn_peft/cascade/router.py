# SPDX-License-Identifier: Apache-2.0
"""The router: which expert an image goes to, by a Gaussian mixture or k-means on the dispatcher's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.features import Whitening, fit_whitening
from . import folder as files

ROUTER_NAME = "router.json"
ROUTER_TENSORS_NAME = "router.safetensors"
_CENTRES = {**files.whitening_shapes(), "means": ("K", "d")}
_SHAPES = {"gmm": {**_CENTRES, "weights": ("K",), "precisions_cholesky": ("K", "d", "d")}, "kmeans": _CENTRES}


@dataclass(frozen=True, eq=False)
class Router:
    """Features -> number of the expert; needs scikit-learn to be fitted, not to be used."""

    kind: str  # "gmm" or "kmeans"
    whitening: Whitening  # of the L2-normalised features, to d dims of unit variance
    # fp64: "means" (K, d); of a mixture also "weights" (K,) and "precisions_cholesky" (K, d, d), P with P Pᵀ the
    # inverse covariance.
    clusters: Mapping[str, Tensor]
    dim: int  # principal components that were asked for; d where the features have as many
    seed: int  # of the clustering
    sizes: tuple[int, ...]  # how many images of the fit go to each expert

    @property
    def experts(self) -> int:
        """K."""
        return len(self.clusters["means"])

    def scores(self, features: Tensor) -> Tensor:
        """How well each component fits features (n, F) of the dispatcher: fp64 (n, K), up to a constant.

        Of a mixture the log of weight times density; of k-means −½ the squared distance.
        """
        points, means = _points(self.whitening, features), self.clusters["means"]
        if self.kind == "kmeans":
            return torch.stack([-0.5 * (points - mean).square().sum(1) for mean in means], 1)
        weights, precisions, found = self.clusters["weights"], self.clusters["precisions_cholesky"], []
        for weight, mean, cholesky in zip(weights, means, precisions, strict=True):
            distance = ((points - mean) @ cholesky).square().sum(1)
            found.append(weight.log() + cholesky.diagonal().log().sum() - 0.5 * distance)
        return torch.stack(found, 1)

    def assign(self, features: Tensor) -> Tensor:
        """The most likely component, or the nearest centre, of the dispatcher's features (n, F): int64 (n,)."""
        return self.scores(features).argmax(1)

    def save(self, folder: str | Path) -> None:
        """Write ``router.safetensors`` and, when that is whole, ``router.json``."""
        folder = Path(folder)
        files.write_tensors(folder / ROUTER_TENSORS_NAME, {**files.whitening_tensors(self.whitening), **self.clusters})
        facts = {"kind": self.kind, "dim": self.dim, "seed": self.seed, "sizes": list(self.sizes)}
        files.write_json(folder / ROUTER_NAME, facts)

    @classmethod
    def load(cls, folder: str | Path) -> Router:
        """Read what [`save`] wrote; damaged files are refused."""
        path = Path(folder) / ROUTER_NAME
        facts = files.read_json(path, {"kind": str, "dim": int, "seed": int, "sizes": list})
        if facts["kind"] not in _SHAPES:
            raise ValueError(f"{path}: kind must be one of {', '.join(_SHAPES)}; it is {facts['kind']!r}.")
        tensors_path = path.with_name(ROUTER_TENSORS_NAME)
        tensors = files.read_tensors(tensors_path, _SHAPES[facts["kind"]])
        whitening = files.read_whitening(tensors, tensors_path)
        if len(facts["sizes"]) != len(tensors["means"]):
            raise ValueError(f"{path} has {len(facts['sizes'])} clusters, {tensors_path} {len(tensors['means'])}.")
        precisions = tensors.get("precisions_cholesky")
        if precisions is not None and not bool((precisions.diagonal(dim1=1, dim2=2) > 0).all()):
            raise ValueError(f"{tensors_path}: precisions_cholesky must have positive diagonals: it is damaged.")
        clusters = {name: tensor for name, tensor in tensors.items() if name not in files.WHITENING}
        sizes = tuple(int(size) for size in facts["sizes"])
        return cls(facts["kind"], whitening, clusters, facts["dim"], facts["seed"], sizes)


def _points(whitening: Whitening, features: Tensor) -> Tensor:
    return whitening(F.normalize(features.double(), dim=1), unit_variance=True).double()


def fit_router(features: Tensor, experts: int = 5, *, kind: str = "gmm", dim: int = 20, seed: int = 0) -> Router:
    """Cluster the dispatcher's features of the training images (sections 3.4 and 4.4 of the paper).

    Features (n, F) are L2-normalised, projected to `dim` principal components of unit variance, and clustered: by a
    Gaussian mixture with full covariances ("gmm"), or by k-means ("kmeans"), each started five times.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        message = "A router is fitted by scikit-learn, which is not installed: pip install 'smn_peft[eval]'."
        raise ImportError(message) from error
    if kind not in _SHAPES:
        raise ValueError(f"kind must be one of {', '.join(_SHAPES)}; got {kind!r}.")
    if len(features) < experts:
        raise ValueError(f"{len(features)} images cannot make {experts} clusters: take fewer experts, or more images.")
    whitening = fit_whitening(F.normalize(features.double(), dim=1), min(dim, features.shape[1], len(features) - 1))
    points = _points(whitening, features).numpy()
    method, attributes = {
        "gmm": (GaussianMixture, {name: f"{name}_" for name in ("means", "weights", "precisions_cholesky")}),
        "kmeans": (KMeans, {"means": "cluster_centers_"}),
    }[kind]
    model: Any = method(experts, n_init=5, max_iter=500, random_state=seed).fit(points)  # warns if it does not settle
    found = {name: torch.as_tensor(getattr(model, attribute)) for name, attribute in attributes.items()}
    clusters = {name: tensor.double().contiguous() for name, tensor in found.items()}
    router = Router(kind, whitening, clusters, dim, seed, (0,) * experts)
    sizes = torch.bincount(router.assign(features), minlength=experts)
    return replace(router, sizes=tuple(sizes.tolist()))


def check_clusters(sizes: Sequence[int], batch_size: int) -> None:
    """Refuse clusters of fewer images than a batch, from which an expert cannot learn."""
    small = [f"cluster {number} has {size}" for number, size in enumerate(sizes) if size < batch_size]
    if small:
        found = f"Of n={sum(sizes)} training images in K={len(sizes)} clusters {', '.join(small)}"
        fix = "take fewer experts, another router_seed, router='kmeans', or a smaller batch_size. The dispatcher stays"
        raise ValueError(
            f"{found}, and an expert needs a batch of {batch_size} at least: {fix}; the dispatcher stays."
        )
