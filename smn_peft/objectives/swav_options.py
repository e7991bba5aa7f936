# SPDX-License-Identifier: Apache-2.0
"""`SwAVOptions`: every option of SwAV with its help; the defaults are the paper's runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .heads import PROJECTIONS

__all__ = ["SwAVOptions"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SwAVOptions:
    """Options of `SwAV`.

    The defaults are the paper's but for the projection: its authors take a bare linear one, which in short runs stays
    at loss ln K.
    """

    projection: Literal["linear", "mlp"] = _option(
        "mlp", "Projection head: 'linear' (the paper's authors) or 'mlp' (SwAV's own: Linear-BN-ReLU-Linear)."
    )
    hidden_dim: int = _option(2048, "Width of the hidden layer of the 'mlp' projection.")
    output_dim: int = _option(128, "Dimension of the embeddings that are compared with the prototypes.")
    prototypes: int = _option(500, "Number of prototypes, at most batch + queue.")
    temperature: float = _option(0.1, "Temperature τ of the predictions.")
    epsilon: float = _option(0.05, "Sinkhorn's ε; the smaller, the harder the codes.")
    sinkhorn_iterations: int = _option(3, "Number of Sinkhorn iterations.")
    queue_length: int = _option(512, "Rows of earlier batches that join the Sinkhorn, over all processes; 0 for none.")
    queue_from: float = _option(0.2, "Fraction of the run from which the queue fills; it counts once it is full.")
    queue_from_step: int | None = _option(None, "Step from which the queue fills, in the place of `queue_from`.")
    freeze_prototypes_steps: int = _option(5005, "Number of first steps in which the prototypes do not move.")
    global_crops: int = _option(2, "Number of first crops of a batch that codes are computed from.")
    allow_few_rows: bool = _option(False, "Train although batch and queue have fewer rows than there are prototypes.")

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {sorted(PROJECTIONS)}, got {self.projection!r}.")
        for name in ("hidden_dim", "output_dim", "sinkhorn_iterations", "global_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.prototypes < 2:
            raise ValueError(f"prototypes must be 2 or more, got {self.prototypes}: one would fit every image.")
        for name in ("temperature", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("queue_length", "queue_from_step", "freeze_prototypes_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not 0 <= self.queue_from <= 1:
            raise ValueError(
                f"queue_from is a fraction of the run and must lie in [0, 1], got {self.queue_from}: for a number of "
                "steps set queue_from_step."
            )
