# SPDX-License-Identifier: Apache-2.0
"""What compressors make of a mask and of fully fine-tuned weights, as Tables 6 and 7 show for two datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..training.run import MODEL_NAME
from .artefact import Cell
from .run_spec import RunSpec
from .scale import Scale
from .store import RunStore

__all__ = ["NOTE", "cells_of", "details_of"]

NOTE = (
    "First seed. The paper's reductions of masks fit its own fractions of fp32 only if a mask before compression "
    "counts two bits for each weight; here a packed mask counts one."
)


def _runs(scale: Scale, name: str) -> tuple[RunSpec, RunSpec]:
    """The mask, and the full fine-tuning beside it."""
    key, dataset = scale.choices[name]
    setting = scale.unsupervised[key]
    return scale.run(setting, "mask", dataset), scale.run(setting, "full", dataset)


def cells_of(name: str) -> Callable[[Scale], list[Cell]]:
    """The cells of a table: which runs are compressed, and how large they are before."""

    def cells(scale: Scale) -> list[Cell]:
        mask, full = _runs(scale, name)
        label = scale.unsupervised[scale.choices[name][0]].label
        return [
            Cell("", f"{label}: mask", "file", mask, "bytes"),
            Cell("", f"{label}: mask", "density", mask, "density"),
            Cell("", f"{label}: full fine-tuning", "file", full, "bytes"),
        ]

    return cells


def details_of(name: str) -> Callable[[RunStore, Scale, Sequence[int]], Any]:
    """The table itself: every compressor on both, and its Markdown."""

    def details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
        from ..analysis.compression import adapter_compression, format_compression

        mask, full = (spec.seeded(seeds[0]) for spec in _runs(scale, name))
        if store.failure(mask) is not None or store.failure(full) is not None:
            return None
        table = adapter_compression(store.path(mask), store.path(full) / MODEL_NAME)
        return {**asdict(table), "markdown": format_compression(table)}

    return details
