# SPDX-License-Identifier: Apache-2.0
"""Training the parts of a cascade: dispatcher and router by `prepare`, experts by `train_experts`, none done twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from .._options import check_options, option
from ..data import ImageDataset
from ..evaluation import extract_features
from ..storage.files import atomic_write
from ..storage.fingerprint import tensor_digest
from ..training import TrainArguments, load_run, run
from ..training.arguments import objective_kind
from ..training.assemble import build_images, evaluation_of, read_indices
from ..training.checkpoint import latest_checkpoint, start_digest
from ..training.processes import build_accelerator
from ..training.run import finished_run
from .folder import CASCADE_NAME
from .router import ROUTER_NAME, Router, check_clusters, fit_router

DISPATCHER = "dispatcher"
_CLUSTERS = "clusters"


@dataclass
class CascadeArguments:
    """What a cascade is told beside the arguments of its runs; the defaults are the paper's (section 4.4)."""

    experts: int = option(5, "Number K of clusters, each with an expert.", least=2)
    router: Literal["gmm", "kmeans"] = option("gmm", "A Gaussian mixture, as in the paper's runs, or k-means.")
    router_dim: int = option(20, "Principal components of the dispatcher's features that the router sees.", least=1)
    router_seed: int = option(0, "Seed of the clustering.")
    embed_dim: int | None = option(None, "Dimension of the embedding; None: the number of features.", least=1)
    ensemble: bool = option(
        False, "Train K dispatchers with other seeds too: what as many masks are worth without clusters."
    )

    def __post_init__(self) -> None:
        """Check the options before anything is loaded."""
        check_options(self)


def prepare(arguments: TrainArguments, options: CascadeArguments) -> tuple[Router, ImageDataset]:
    """Train the dispatcher and fit the router, as far as that is not done; after this every expert can be a job.

    Returns the router, and the images that the dispatcher trained on. `output_dir` is the cascade's folder.

    Raises:
        ValueError: If arguments do not fit, a cluster has fewer images than a batch, or the folder holds a finished
            cascade of another router.
    """
    check_run(arguments, options)
    accelerator, folder = build_accelerator(arguments), Path(arguments.output_dir)
    dispatcher = dispatcher_arguments(arguments)
    if finished_run(dispatcher) is None and accelerator.is_main_process:
        for name in (CASCADE_NAME, ROUTER_NAME):  # of another dispatcher
            (folder / name).unlink(missing_ok=True)
    train_once(dispatcher, evaluate=True)
    images = build_images(dispatcher).train
    if (router := _known_router(folder, options)) is None:
        _, backbone = load_run(folder / DISPATCHER, backbone=arguments.backbone)
        features = extract_features(
            backbone.model.to(accelerator.device),
            images,
            evaluation_of(backbone),
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            accelerator=accelerator,
        ).features
        if accelerator.is_main_process:
            (folder / CASCADE_NAME).unlink(missing_ok=True)
            kind, dim, seed = options.router, options.router_dim, options.router_seed
            router = fit_router(features, options.experts, kind=kind, dim=dim, seed=seed)
            check_clusters(router.sizes, arguments.batch_size)
            route = router.assign(features)
            (folder / _CLUSTERS).mkdir(parents=True, exist_ok=True)
            for number in range(options.experts):
                with atomic_write(folder / _CLUSTERS / f"{expert_name(number)}.npy") as file:
                    np.save(file, (route == number).nonzero().squeeze(1).numpy(), allow_pickle=False)
            router.save(folder)
        accelerator.wait_for_everyone()
        router = Router.load(folder)
    check_clusters(router.sizes, arguments.batch_size)
    return router, images


def train_experts(arguments: TrainArguments, options: CascadeArguments, numbers: Sequence[int]) -> None:
    """Train some of the experts, after [`prepare`]; one that is done is left alone.

    An expert starts where the dispatcher ended and trains on its own cluster, for about as many steps; they count
    from 0.

    Raises:
        ValueError: If there is no such expert, dispatcher and router are not there, or they are of other settings.
    """
    check_run(arguments, options)
    if unknown := [number for number in numbers if not 0 <= number < options.experts]:
        raise ValueError(f"There is no expert {unknown[0]}: they count from 0 to {options.experts - 1}.")
    folder, dispatcher = Path(arguments.output_dir), dispatcher_arguments(arguments)
    router = _known_router(folder, options)
    if finished_run(dispatcher) is None or router is None:
        fix = "make both first, by prepare(…) or `smn cascade train … --prepare`, and then the experts, in any order"
        raise ValueError(f"{folder} holds no finished dispatcher with a router of these settings: {fix}.")
    images, accelerator = build_images(dispatcher).train, build_accelerator(arguments)
    for number in numbers:
        indices_file = folder / _CLUSTERS / f"{expert_name(number)}.npy"
        cluster = images.subset(read_indices(indices_file, len(images)))
        # Its queue starts at the fraction of the run that the objective's options name, like the dispatcher's.
        expert = replace(
            arguments,
            output_dir=str(folder / expert_name(number)),
            init_from=str(folder / DISPATCHER),
            indices_file=str(indices_file),
            epochs=max(1, round(len(images) / router.sizes[number] * arguments.epochs)),  # section 4: as many steps
            warmup_epochs=arguments.warmup_epochs * len(images) / router.sizes[number],
            evaluate_every=None,
            resume=True,
        )
        if train_once(expert, cluster) and accelerator.is_main_process:
            (folder / CASCADE_NAME).unlink(missing_ok=True)
        accelerator.wait_for_everyone()


def check_run(arguments: TrainArguments, options: CascadeArguments) -> None:
    """Refuse the arguments of a dispatcher from which no cascade can be made, before it trains."""
    if arguments.adapt != "mask":
        raise ValueError(f"A cascade is made of masks: adapt must be 'mask', not {arguments.adapt!r}.")
    if objective_kind(arguments).needs_labels:
        needs = f"objective={arguments.objective!r} needs them"
        raise ValueError(f"A cascade learns without labels, and {needs}: take objective='swav' or a recipe with it.")
    if arguments.streaming:
        raise ValueError("A cascade clusters all training images: leave out streaming.")
    if arguments.keep_checkpoints < 1:
        raise ValueError("Experts start from the dispatcher's scores: keep_checkpoints must be at least 1.")
    for name in ("init_from", "indices_file"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} is set for every expert by the cascade: leave it out.")
    if options.ensemble and not arguments.pretrained:
        raise ValueError("ensemble needs one base, and with pretrained=False each seed has its own: leave it out.")


def dispatcher_arguments(arguments: TrainArguments) -> TrainArguments:
    """The arguments of the dispatcher's own run."""
    return replace(arguments, output_dir=str(Path(arguments.output_dir) / DISPATCHER), resume=True)


def expert_name(number: int) -> str:
    """Name of an expert's folder and adapter; they count from 0."""
    return f"expert-{number}"


def train_once(arguments: TrainArguments, images: ImageDataset | None = None, *, evaluate: bool = False) -> bool:
    """Train a run that is not done yet, from its newest checkpoint on; returns whether there was anything to do.

    A run on other `images` than its `indices_file` chose before is refused like other settings.
    """
    more = {"indices": tensor_digest(images.rows)} if images is not None else {}
    # A run that is done needs the checkpoint that it started from no more.
    if arguments.init_from is not None and latest_checkpoint(arguments.init_from) is not None:
        more["start"] = start_digest(arguments.init_from)
    if finished_run(arguments, **more) is not None:
        return False
    run(arguments, evaluate=evaluate)
    return True


def _known_router(folder: Path, options: CascadeArguments) -> Router | None:
    """The router that was fitted with these options, if any; ValueError if a finished cascade has another."""
    if not (folder / ROUTER_NAME).is_file():
        return None
    found = Router.load(folder)
    fitted = {"router": found.kind, "experts": found.experts, "router_dim": found.dim, "router_seed": found.seed}
    asked = {key: getattr(options, key) for key in fitted}
    if fitted == asked:
        return found
    if (folder / CASCADE_NAME).is_file():
        differing = [f"{key}: was {was!r}, is {asked[key]!r}" for key, was in fitted.items() if was != asked[key]]
        fix = f"take the old ones, or another output_dir, into which its folder {DISPATCHER} may be copied"
        raise ValueError(f"{folder} holds a finished cascade of other settings ({'; '.join(differing)}): {fix}.")
    return None
