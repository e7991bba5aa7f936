# SPDX-License-Identifier: Apache-2.0
"""What masks, clusters and features look like, as data: densities, similarity, composition, maps."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..evaluation import Features

_BLOCK = re.compile(
    r"(?:^|\.)(?P<block>(?:layers?|stages?|blocks?|resblocks)[._]?\d+(?:\.(?:blocks?\.)?\d+(?=\.))?)\.(?P<rest>.+)$"
)


@dataclass(frozen=True)
class LayerDensity:
    """Density of one masked tensor, the fraction of its weights that is active; the paper calls it sparsity.

    `block` is "blocks.3" or "layer2.0", and "" outside of blocks; `kind` is the name within the block, such as
    "attn.qkv.weight". After averaging, `density` is the mean and `spread` the standard deviation; None for one mask.
    """

    name: str
    block: str
    kind: str
    weights: int
    density: float
    spread: float | None = None


def layer_densities(masks: Mapping[str, Tensor]) -> list[LayerDensity]:
    """Density of every tensor of `model.masks()`, in the model's order; ValueError without masks."""
    if not masks:
        raise ValueError("There are no masks: the adapter masks nothing.")
    rows = []
    for name, mask in masks.items():
        found = _BLOCK.search(name)
        block, kind = (found["block"], found["rest"]) if found else ("", name)
        kind = re.sub(r"\.\d+(?=\.)", "", kind)
        rows.append(LayerDensity(name, block, kind, mask.numel(), int(mask.count_nonzero()) / max(1, mask.numel())))
    return rows


def average_densities(runs: Sequence[Sequence[LayerDensity]]) -> list[LayerDensity]:
    """Mean and standard deviation of the densities of several masks; ValueError unless all mask the same layers."""
    if not runs or any([row.name for row in run] != [row.name for row in runs[0]] for run in runs):
        raise ValueError("Only masks of the same layers are averaged: name runs of one backbone and set of layers.")
    averaged = []
    for rows in zip(*runs, strict=True):
        values = [row.density for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        averaged.append(replace(rows[0], density=statistics.fmean(values), spread=spread))
    return averaged


@dataclass(frozen=True)
class Similarity:
    """Two masks of the same weights, by name, compared by their inactive weights, which are few.

    `jaccard` is the weights inactive in both over those inactive in either, 1 where neither has any; `hamming` the
    fraction of the weights on which the masks differ; `…_chance` is the same of random masks of the same densities.
    """

    first: str
    second: str
    jaccard: float
    jaccard_chance: float
    hamming: float
    hamming_chance: float


def mask_similarity(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: tuple[str, str] = ("first", "second")
) -> Similarity:
    """Compare two masks (bool, by tensor name); ValueError if tensors or shapes differ."""
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (first, second)]
    if shapes[0] != shapes[1] or not first:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        where = f", such as {differing[0][0]}" if differing else ""
        raise ValueError(f"{names[0]} and {names[1]} mask other tensors{where}: name runs of one backbone and layers.")
    off = measured = total = 0
    chance = 0.0
    for name, mask in first.items():
        one, two = ~mask.cpu(), ~second[name].cpu()
        counts = int(one.count_nonzero()), int(two.count_nonzero())
        measured += int((one & two).count_nonzero())
        chance += counts[0] * counts[1] / max(1, one.numel())
        off += sum(counts)
        total += one.numel()
    jaccard = [both / (off - both) if off else 1.0 for both in (measured, chance)]
    return Similarity(*names, *jaccard, *((off - 2 * both) / total for both in (measured, chance)))


def similarity_matrix(masks: Mapping[str, Mapping[str, Tensor]]) -> list[Similarity]:
    """Compare every pair of the named masks once; ValueError for fewer than two masks, or of different tensors."""
    names = list(masks)
    if len(names) < 2:
        raise ValueError(f"Similarity is between two masks or more; got {len(names)}.")
    return [
        mask_similarity(masks[one], masks[two], (one, two)) for i, one in enumerate(names) for two in names[i + 1 :]
    ]


@dataclass(frozen=True)
class ClusterComposition:
    """One cluster of a router: its images' share in its most common class, in its two most common, and so on."""

    cluster: int
    images: int
    cumulative: tuple[float, ...]


def cluster_composition(assignments: Tensor, labels: Tensor) -> list[ClusterComposition]:
    """Composition of every cluster that has an image (Figure 11), from clusters and classes, int64 (n,) each."""
    if assignments.ndim != 1 or assignments.shape != labels.shape or not len(labels):
        shapes = f"{tuple(assignments.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"Assignments and labels must be (n,) of the same images; got {shapes}.")
    found = []
    for cluster in assignments.unique().tolist():
        mine = torch.bincount(labels[assignments == cluster], minlength=int(labels.max()) + 1)
        mine = mine.sort(descending=True).values
        shares = (mine.cumsum(0).double() / mine.sum()).tolist()
        found.append(ClusterComposition(int(cluster), int(mine.sum()), tuple(shares)))
    return found


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Features laid out in the plane: what was embedded, fp32 points (n, 2), and int64 labels (n,)."""

    label: str
    points: Tensor
    labels: Tensor


def embedding_map(
    features: Features, label: str, *, classes: int | None = 20, perplexity: float = 30.0, seed: int = 0
) -> EmbeddingMap:
    """Lay out L2-normalised features by scikit-learn's t-SNE, initialised by PCA (Figure 10).

    Distances between far points of such a map mean nothing, nor do its axes. Only the first `classes` are taken, as in
    the figure; None takes all. `perplexity` is lowered where there are too few points for it.

    Raises:
        ValueError: There are no labels, or fewer than 4 points.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("Embedding maps are made by scikit-learn: pip install 'smn_peft[eval]'.") from error
    labels = features.labels_for("An embedding map")
    chosen = torch.ones_like(labels, dtype=torch.bool) if classes is None else labels < classes
    count = int(chosen.sum())
    if count < 4:
        raise ValueError(f"An embedding map needs 4 points; there are {count} of the first {classes} classes.")
    vectors = torch.nn.functional.normalize(features.features[chosen], dim=1).numpy()
    layout = TSNE(2, perplexity=min(perplexity, (count - 1) / 3), init="pca", random_state=seed)
    return EmbeddingMap(label, torch.from_numpy(layout.fit_transform(vectors)).float(), labels[chosen])
