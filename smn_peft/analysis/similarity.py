# SPDX-License-Identifier: Apache-2.0
"""How alike the masks of tasks and seeds are, against what masks of the same densities share by chance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .canvas import canvas

__all__ = ["Similarity", "mask_similarity", "plot_similarity", "similarity_matrix"]


@dataclass(frozen=True)
class Similarity:
    """Two masks of the same weights compared.

    Nearly all weights of either mask are active, so what is compared is which are inactive.

    Attributes:
        first: Name of the one.
        second: Name of the other.
        jaccard: Weights inactive in both over those inactive in either; 1 where neither has any.
        jaccard_chance: The same, expected of masks drawn at random with each layer's own densities.
        hamming: Fraction of the weights on which they differ.
        hamming_chance: The same by chance.
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
    """Compare two masks.

    Chance takes the densities of every tensor as they are: that both masks spare the same layers is not counted as
    being alike. Its Jaccard index is the ratio of the expected numbers.

    Args:
        first: Bool masks by tensor name.
        second: Masks of the same tensors.
        names: What they are called.

    Raises:
        ValueError: If they are masks of other tensors.
    """
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (first, second)]
    if shapes[0] != shapes[1] or not first:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        where = f", such as {differing[0][0]}" if differing else ""
        raise ValueError(f"{names[0]} and {names[1]} mask other tensors{where}: name runs of one backbone and layers.")
    both = either = differ = total = 0
    expected_both = expected_differ = 0.0
    off = [0, 0]
    for name, mask in first.items():
        one, two = ~mask.cpu(), ~second[name].cpu()
        count, counts = one.numel(), (int(one.count_nonzero()), int(two.count_nonzero()))
        common = int((one & two).count_nonzero())
        both += common
        either += sum(counts) - common
        differ += sum(counts) - 2 * common
        total += count
        chance = counts[0] * counts[1] / max(1, count)
        expected_both += chance
        expected_differ += sum(counts) - 2 * chance
        off = [off[0] + counts[0], off[1] + counts[1]]
    expected_either = sum(off) - expected_both
    return Similarity(
        *names,
        jaccard=both / either if either else 1.0,
        jaccard_chance=expected_both / expected_either if expected_either else 1.0,
        hamming=differ / total,
        hamming_chance=expected_differ / total,
    )


def similarity_matrix(masks: Mapping[str, Mapping[str, Tensor]]) -> list[Similarity]:
    """Every pair of the named masks once.

    Raises:
        ValueError: There are fewer than two, or they mask other tensors.
    """
    names = list(masks)
    if len(names) < 2:
        raise ValueError(f"Similarity is between two masks or more; got {len(names)}.")
    return [
        mask_similarity(masks[one], masks[two], (one, two)) for i, one in enumerate(names) for two in names[i + 1 :]
    ]


def plot_similarity(rows: Sequence[Similarity], path: str | os.PathLike[str], *, title: str = "") -> None:
    """A square per pair: the Jaccard index of the inactive weights below the diagonal, chance above it.

    Args:
        rows: From [`similarity_matrix`].
        path: File to write.
        title: Title of the picture.
    """
    names = list(dict.fromkeys(name for row in rows for name in (row.first, row.second)))
    values: list[list[float]] = [[float("nan")] * len(names) for _ in names]
    for row in rows:
        i, j = sorted((names.index(row.first), names.index(row.second)))
        values[j][i], values[i][j] = 100 * row.jaccard, 100 * row.jaccard_chance
    highest = max(100 * max(row.jaccard, row.jaccard_chance) for row in rows) or 1.0
    side = max(4.5, 0.9 * len(names) + 2.0)
    with canvas(path, size=(side + 1.2, side)) as axes:
        axes.grid(False)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest)
        for j, line in enumerate(values):
            for i, value in enumerate(line):
                dark = value > 0.6 * highest
                text = "–" if i == j else f"{value:.1f}"
                axes.text(i, j, text, ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title or "below the diagonal: measured; above: by chance")
        axes.figure.colorbar(image, ax=axes, label="Jaccard index of the inactive weights (%)")
