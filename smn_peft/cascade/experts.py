# SPDX-License-Identifier: Apache-2.0
"""Experts: runs that start where the dispatcher ended, each on its own cluster, independent of each other."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data import ImageDataset
from ..storage import atomic_write
from ..training import RunSummary, TrainArguments, run
from ..training.checkpoint import latest_checkpoint, start_digest
from ..training.run import finished_run, indices_digest

__all__ = ["DISPATCHER", "expert_arguments", "expert_epochs", "expert_name", "train_once", "write_clusters"]

DISPATCHER = "dispatcher"
_CLUSTERS = "clusters"


def expert_name(number: int) -> str:
    """Name of an expert's folder and adapter; they count from 0."""
    return f"expert-{number}"


def expert_epochs(images: int, cluster: int, epochs: int) -> int:
    """``round(n / |D_k| · E)`` epochs, so that every expert makes about as many steps as the dispatcher (section 4).

    Args:
        images: n, images that the dispatcher trains on.
        cluster: |D_k|, images of the cluster.
        epochs: E, the dispatcher's.
    """
    return max(1, round(images / cluster * epochs))


def write_clusters(folder: Path, route: Tensor, experts: int) -> None:
    """Write the image numbers of every cluster, from the expert (n,) of each training image."""
    (folder / _CLUSTERS).mkdir(parents=True, exist_ok=True)
    for number in range(experts):
        buffer = io.BytesIO()
        np.save(buffer, (route == number).nonzero().squeeze(1).numpy(), allow_pickle=False)
        with atomic_write(folder / _CLUSTERS / f"{expert_name(number)}.npy") as file:
            file.write(buffer.getvalue())


def expert_arguments(
    arguments: TrainArguments, folder: Path, number: int, images: int, cluster: int
) -> TrainArguments:
    """The arguments of an expert's run: the dispatcher's, from its end, on one cluster, for as many steps.

    The queue starts at the fraction of the run that the objective's options name, a fifth by default, like the
    dispatcher's.

    Args:
        arguments: The dispatcher's.
        folder: The cascade's folder.
        number: Which expert.
        images: n, images that the dispatcher trained on.
        cluster: |D_k|, images of this expert's cluster.
    """
    return replace(
        arguments,
        output_dir=str(folder / expert_name(number)),
        init_from=str(folder / DISPATCHER),
        indices_file=str(folder / _CLUSTERS / f"{expert_name(number)}.npy"),
        epochs=expert_epochs(images, cluster, arguments.epochs),
        warmup_epochs=arguments.warmup_epochs * images / cluster,
        evaluate_every=None,
        resume=True,
    )


def train_once(arguments: TrainArguments, images: ImageDataset | None = None, *, evaluate: bool = False) -> bool:
    """Train a run that is not done yet, going on from its newest checkpoint; say whether there was anything to do.

    Args:
        arguments: The run, with ``resume``.
        images: What it trains on, if its `indices_file` says so: other images are another run.
        evaluate: Evaluate before and after.

    Raises:
        ValueError: If a run with other settings, start or images is done, or was begun, in its folder.
    """
    more = {"indices": indices_digest(images)} if images is not None else {}
    # A run that is done needs the checkpoint that it started from no more.
    if arguments.init_from is not None and latest_checkpoint(arguments.init_from) is not None:
        more["start"] = start_digest(arguments.init_from)
    found: RunSummary | None = finished_run(arguments, **more)
    if found is None:
        run(arguments, evaluate=evaluate)
    return found is None
