# SPDX-License-Identifier: Apache-2.0
"""`CascadeArguments`: how many experts, how images are routed to them, and how large the embedding is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .._options import option
from ..training import TrainArguments
from ..training.arguments import objective_kind

__all__ = ["CascadeArguments", "check_run"]


@dataclass
class CascadeArguments:
    """What a cascade is told beside the arguments of its runs; the defaults are the paper's (section 4.4).

    Raises:
        ValueError: On a number or a name that makes no sense.
    """

    experts: int = option(5, "Number K of clusters, each with an expert.")
    router: Literal["gmm", "kmeans"] = option("gmm", "A Gaussian mixture, as in the paper's runs, or k-means.")
    router_dim: int = option(20, "Principal components of the dispatcher's features that the router sees.")
    router_seed: int = option(0, "Seed of the clustering.")
    embed_dim: int | None = option(None, "Dimension of the embedding; None: as many as the backbone has features.")
    ensemble: bool = option(
        False, "Train K dispatchers with other seeds too: what as many masks are worth without clusters."
    )

    def __post_init__(self) -> None:
        """Check the numbers before anything is loaded."""
        if self.experts < 2:
            raise ValueError(f"experts must be at least 2; got {self.experts}: one would see what the dispatcher saw.")
        if self.router not in ("gmm", "kmeans"):
            raise ValueError(f"router must be gmm or kmeans; got {self.router!r}.")
        if self.router_dim < 1 or (self.embed_dim is not None and self.embed_dim < 1):
            raise ValueError(
                f"router_dim and embed_dim must be at least 1; got {self.router_dim} and {self.embed_dim}."
            )


def check_run(arguments: TrainArguments) -> None:
    """Refuse the arguments of a dispatcher from which no cascade can be made, before it trains.

    Raises:
        ValueError: If it trains no mask, needs labels, keeps no scores, or is itself a part of something.
    """
    if arguments.adapt != "mask":
        raise ValueError(f"A cascade is made of masks: adapt must be 'mask', not {arguments.adapt!r}.")
    if objective_kind(arguments).needs_labels:
        raise ValueError(
            f"A cascade learns without labels, and objective={arguments.objective!r} needs them: take "
            "objective='swav', as the recipes swav-resnet and swav-small do."
        )
    if arguments.keep_checkpoints < 1:
        raise ValueError("Experts start from the dispatcher's scores: keep_checkpoints must be at least 1.")
    for name in ("init_from", "indices_file"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} is set for every expert by the cascade: leave it out.")
