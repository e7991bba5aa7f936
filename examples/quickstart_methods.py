# SPDX-License-Identifier: Apache-2.0
"""The ways in which the quickstart adapts its base, with labels and without, and their settings.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["METHODS", "SWAV", "Method"]

# For a few hundred images: fewer prototypes than a batch has images, harder codes, no queue.
SWAV = {"prototypes": 50, "hidden_dim": 512, "epsilon": 0.02, "queue_length": 0, "freeze_prototypes_steps": 0}


@dataclass(frozen=True)
class Method:
    """What is adapted, by what, and how.

    Attributes:
        name: Short, for folders.
        what: "mask", "weights", or "statistics": a control with all that a mask has but the mask.
        settings: Fields of `LoopArguments`.
        labels: Whether it learns by cross-entropy with a new head, or by SwAV without labels.
        batch_norm: Of the mask.
        epochs: Passes for one of the quickstart's; SwAV, which has no labels to go by, takes two.
        swept: Learning rates that `--sweep` tries.
    """

    name: str
    what: str
    settings: Mapping[str, Any]
    labels: bool = True
    batch_norm: str = "adapt"
    epochs: int = 1
    swept: tuple[float, ...] = field(default=())

    def at(self, lr: float) -> Method:
        """The same with another learning rate."""
        return replace(self, settings={**self.settings, "lr": lr})


# Settings were chosen on a validation part of the training images, as --sweep tries learning rates.
_DEFAULTS = {"optimizer": "adamw", "lr": 0.1, "head_lr": 0.01, "batch_size": 32}
_SGD = {"head_lr": 0.1, "batch_size": 32}
_SWAV = {"head_lr": 0.1, "batch_size": 64}
METHODS = {
    "new head, statistics adapt": Method("statistics", "statistics", {**_SGD, "lr": 0.0}),
    "full fine-tuning": Method("full", "weights", {**_SGD, "lr": 0.2}, swept=(0.01, 0.03, 0.1, 0.2, 0.4)),
    "mask, the defaults": Method("frozen", "mask", _DEFAULTS, batch_norm="frozen", swept=(0.03, 0.1, 0.2, 0.4)),
    "mask, the paper's recipe": Method("adapt", "mask", {**_SGD, "lr": 20.0}, swept=(10.0, 20.0, 40.0, 80.0, 160.0)),
    "SwAV, statistics adapt": Method("control", "statistics", {**_SWAV, "lr": 0.0}, labels=False, epochs=2),
    "SwAV, mask": Method(
        "swav", "mask", {**_SWAV, "lr": 300.0}, labels=False, epochs=2, swept=(30.0, 100.0, 300.0, 1000.0)
    ),
}
