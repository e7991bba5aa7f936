# SPDX-License-Identifier: Apache-2.0
"""Density of masks per layer and kind of layer, over tasks and seeds (the paper's Figures 6 and 7).

The paper calls the fraction of weights that stay active "sparsity"; here it is the density.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .canvas import COLOURS, MARKERS, canvas, legend_outside

__all__ = ["LayerDensity", "average_densities", "layer_densities", "plot_densities"]

_BLOCK = re.compile(
    r"(?:^|\.)(?P<block>(?:layers?|stages?|blocks?|resblocks)[._]?\d+(?:\.(?:blocks?\.)?\d+(?=\.))?)\.(?P<rest>.+)$"
)


@dataclass(frozen=True)
class LayerDensity:
    """How much of a tensor is active.

    Attributes:
        name: Name of the tensor in the model.
        block: The block it lies in, "blocks.3" or "layer2.0"; "" outside of blocks.
        kind: What it is within a block, "attn.qkv.weight" or "conv1.weight".
        weights: Number of its weights.
        density: Fraction that is active; after averaging the mean.
        spread: Standard deviation over the averaged masks, None for one.
    """

    name: str
    block: str
    kind: str
    weights: int
    density: float
    spread: float | None = None


def layer_densities(masks: Mapping[str, Tensor]) -> list[LayerDensity]:
    """A row per masked tensor, in the model's order.

    Args:
        masks: Bool masks by tensor name, as `model.masks()` gives them.

    Raises:
        ValueError: There is no mask.
    """
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
    """Mean and standard deviation of several masks of the same layers.

    Raises:
        ValueError: There are none, or they mask other layers.
    """
    if not runs or any([row.name for row in run] != [row.name for row in runs[0]] for run in runs):
        raise ValueError(
            "Only masks of the same layers are averaged: name runs of one backbone and one set of layers."
        )
    averaged = []
    for rows in zip(*runs, strict=True):
        values = [row.density for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        averaged.append(replace(rows[0], density=statistics.fmean(values), spread=spread))
    return averaged


def plot_densities(
    groups: Mapping[str, Sequence[LayerDensity]], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Density over the layers in the model's order.

    One group is drawn as a line per kind over the blocks, as Figure 6; several as a line each over all layers, as
    Figure 7 compares training with labels and without.

    Args:
        groups: Rows by label.
        path: File to write.
        title: Title of the picture.
    """
    with canvas(path, size=(9.0, 4.5)) as axes:
        if len(groups) == 1:
            (rows,) = groups.values()
            blocks = list(dict.fromkeys(row.block for row in rows))
            by_kind: dict[str, list[LayerDensity]] = {}
            for row in rows:
                by_kind.setdefault(row.kind, []).append(row)
            lines = {kind: ([blocks.index(r.block) for r in found], found) for kind, found in by_kind.items()}
            ticks, names = list(range(len(blocks))), [block or "outside" for block in blocks]
        else:
            first = next(iter(groups.values()))
            lines = {label: (list(range(len(rows))), list(rows)) for label, rows in groups.items()}
            starts = [i for i, row in enumerate(first) if i == 0 or row.block != first[i - 1].block]
            ticks, names = starts, [first[i].block or first[i].name.split(".")[-2] for i in starts]
        for index, (label, (x, found)) in enumerate(lines.items()):
            axes.errorbar(
                x,
                [100 * row.density for row in found],
                [100 * (row.spread or 0.0) for row in found],
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if index < len(COLOURS) else "--",
                markersize=4,
                capsize=2,
                label=label,
            )
        axes.set_xticks(ticks, names, rotation=90)
        axes.set(xlabel="block, from the input to the output", ylabel="active weights (%)", title=title)
        legend_outside(axes, "tensor" if len(groups) == 1 else None)
