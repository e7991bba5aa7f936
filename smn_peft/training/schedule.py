# SPDX-License-Identifier: Apache-2.0
"""The learning rate over time: linear warm-up that starts at (e+1)/W, then a cosine to 0."""

from __future__ import annotations

import math
import warnings

__all__ = ["check_warmup", "warmup_cosine"]


def warmup_cosine(position: float, total: float, warmup: float = 0.0) -> float:
    """Factor of the learning rate, between 0 and 1.

    Position, total and warm-up are in one unit, steps or epochs. The authors' code starts its warm-up at e/W and so
    spends its first epoch at learning rate 0; here the first unit has 1/W (facts of section 4.1).

    Args:
        position: Units done.
        total: Units of the whole run.
        warmup: Units of linear warm-up.
    """
    if position < warmup:
        return min(1.0, (position + 1) / warmup)
    if total <= warmup:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (position - warmup) / (total - warmup))))


def check_warmup(warmup: float, epochs: float) -> None:
    """Warn of a warm-up that takes the whole run, whose learning rate then never falls."""
    if warmup >= epochs:
        warnings.warn(
            f"warmup_epochs={warmup:g} is the whole run of {epochs:g} epochs: its learning rate only rises. Shorten "
            "the warm-up, or train longer.",
            stacklevel=3,
        )
