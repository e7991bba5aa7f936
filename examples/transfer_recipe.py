# SPDX-License-Identifier: Apache-2.0
"""How to adapt a real backbone: `Recipe` for masks and full fine-tuning, `LoraRecipe`.

Used by `transfer.py` and the examples on real backbones; not an example by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LoraRecipe", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How to adapt: what trains, from which head, by which optimizer.

    Attributes:
        label: Row of the table.
        mask: Train scores; False: all weights, or LoRA.
        lrs: Learning rates of the scores or weights to sweep.
        adam: Adam for scores or weights and not SGD with momentum 0.9; the head has SGD always.
        probe_head: Start the head from the linear probe, at learning rate 0.001 (a random one: 0.01).
        adapt_statistics: BatchNorm in train mode, re-estimating its statistics; False: the base's, frozen.
        warmup: Fraction of the steps with a rising learning rate, before the cosine.
        epochs: Passes over the training images, in batches of 64.
        smoothing: Label smoothing.
    """

    label: str
    mask: bool
    lrs: tuple[float, ...]
    adam: bool = True
    probe_head: bool = True
    adapt_statistics: bool = False
    warmup: float = 0.3
    epochs: int = 6
    smoothing: float = 0.0


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """Without a mask: train LoRA's factors of a rank on the layers of a mask, scaled by 2."""

    rank: int = 8
