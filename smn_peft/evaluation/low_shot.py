# SPDX-License-Identifier: Apache-2.0
"""`low_shot`: accuracy where only a small fraction of the training images has labels, over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.dataset import label_subset
from .features import Features, check_classes, check_pair
from .linear_probe import fit_linear_probe
from .report import EvalReport

__all__ = ["FRACTIONS", "LowShotRow", "low_shot", "low_shot_probe", "low_shot_reports"]

FRACTIONS = (0.1, 0.04, 0.02, 0.01, 0.005, 0.0025)
"""The paper's: 10 to 0.25 % of the labels."""


@dataclass(frozen=True)
class LowShotRow:
    """One run."""

    fraction: float  # of the labels, as asked for
    images: int  # how many that is
    seed: int
    accuracy: float


def low_shot(
    labels: Tensor,
    evaluate: Callable[[Tensor, int], float],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    balanced: bool = True,
) -> list[LowShotRow]:
    """Call `evaluate` for every fraction and seed; with one seed a smaller subset lies in every larger one.

    Args:
        labels: (n,) of all training images.
        evaluate: (indices (m,) of the images whose labels may be used, seed) -> accuracy on the test set.
        fractions: Parts of the labels, each in (0, 1].
        seeds: Each draws other subsets; passed on, for what else the method draws.
        balanced: As many of every class, one at least; else at random.
    """
    check_classes(labels, "Low-shot")
    for name, given in (("fractions", fractions), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{name} must hold at least one value, each once; got {list(given)}.")
    rows = []
    for fraction, seed in itertools.product(fractions, seeds):
        indices = label_subset(labels, fraction=fraction, balanced=balanced, seed=seed)
        accuracy = float(evaluate(indices, seed))
        if not 0 <= accuracy <= 1:
            found = f"{accuracy} for {len(indices)} images and seed {seed}"
            raise ValueError(f"evaluate must return an accuracy from 0 to 1; it returned {found}.")
        rows.append(LowShotRow(fraction, len(indices), seed, accuracy))
    return rows


def low_shot_probe(
    train: Features,
    test: Features,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    balanced: bool = True,
    **options: Any,
) -> list[LowShotRow]:
    """Low-shot accuracy of linear probes on fixed features: of the frozen base, or of a mask learned without labels.

    A probe sees the features of its subset of `train` only. `options` are those of [`fit_linear_probe`]; with one
    image per class there is nothing to choose a decay on: give one in `decays`.
    """
    labels, _ = check_pair(train, test, "Low-shot")

    def evaluate(indices: Tensor, seed: int) -> float:
        return fit_linear_probe(train.subset(indices), **{"seed": seed, **options}).accuracy(test)

    return low_shot(labels, evaluate, fractions=fractions, seeds=seeds, balanced=balanced)


def low_shot_reports(rows: Iterable[LowShotRow], **fields: Any) -> list[EvalReport]:
    """A report per fraction over its seeds, with fraction and number of images in its settings.

    `fields` are those of [`EvalReport`] beside values and seeds.
    """
    rows, settings, reports = list(rows), fields.pop("settings", {}), []
    for fraction in dict.fromkeys(row.fraction for row in rows):
        found = [row for row in rows if row.fraction == fraction]
        values, seeds = (tuple(getattr(row, name) for row in found) for name in ("accuracy", "seed"))
        more = {"label_fraction": fraction, "labelled_images": found[0].images}
        reports.append(EvalReport(values=values, seeds=seeds, settings={**settings, **more}, **fields))
    return reports
