# SPDX-License-Identifier: Apache-2.0
"""`fit_cascade`: dispatcher, router, experts and projections in turn, each by itself if wanted, none done twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ..data import ImageDataset
from ..training import TrainArguments
from ..training.images import build_images, read_indices
from ..training.processes import build_accelerator
from ..training.run import finished_run
from .arguments import CascadeArguments, check_run
from .cascade import Cascade
from .experts import DISPATCHER, expert_arguments, expert_name, train_once, write_clusters
from .parts import CASCADE_NAME, CascadeParts
from .router import ROUTER_NAME, Router, check_clusters, fit_router

__all__ = ["ENSEMBLE", "fit_cascade", "prepare", "train_experts"]

ENSEMBLE = "ensemble"
_SEEDS = "seeds"


def fit_cascade(arguments: TrainArguments, options: CascadeArguments) -> None:
    """Do all that is not done yet, in `output_dir`.

    Every process of a distributed run calls this, and all see the folder; each run's batches are shared among them.
    Instead, [`prepare`] can be called once, [`train_experts`] with one expert each by as many jobs as there are
    experts, and then this, which finds them done.

    Args:
        arguments: Of the dispatcher, from which the experts' follow; `output_dir` is the cascade's folder.
        options: Of the cascade.

    Raises:
        ValueError: If arguments do not fit, a cluster is too small, or the folder holds another cascade.
    """
    accelerator = build_accelerator(arguments)
    router, images = prepare(arguments, options)
    folder = Path(arguments.output_dir)
    _train_experts(arguments, router, images, range(options.experts), accelerator)
    names = [DISPATCHER, *map(expert_name, range(options.experts))]
    if not _is_done(folder, names, options):
        runs = {name: folder / name for name in names}
        cascade = Cascade.from_runs(runs, router, backbone=arguments.backbone)
        _fit_projections(cascade, arguments, options, images, accelerator)
        if accelerator.is_main_process:
            cascade.save_parts(folder)
    accelerator.wait_for_everyone()
    if options.ensemble:
        _fit_ensemble(arguments, options, images, accelerator)


def prepare(arguments: TrainArguments, options: CascadeArguments) -> tuple[Router, ImageDataset]:
    """Train the dispatcher and fit the router, as far as that is not done; after this every expert can be a job.

    Args:
        arguments: Of the dispatcher; `output_dir` is the cascade's folder.
        options: Of the cascade.

    Returns:
        The router, and the images that the dispatcher trained on.

    Raises:
        ValueError: If arguments do not fit, a cluster has fewer images than a batch, or the folder holds a finished
            cascade of another router.
    """
    _check(arguments, options)
    accelerator, folder = build_accelerator(arguments), Path(arguments.output_dir)
    dispatcher = _dispatcher_arguments(arguments)
    if finished_run(dispatcher) is None and accelerator.is_main_process:
        for name in (CASCADE_NAME, ROUTER_NAME):  # of another dispatcher
            (folder / name).unlink(missing_ok=True)
    train_once(dispatcher, evaluate=True)
    images = build_images(dispatcher).train
    if (router := _known_router(folder, options)) is None:
        _refuse_finished(folder, options)
        cascade = Cascade.from_runs({DISPATCHER: folder / DISPATCHER}, backbone=arguments.backbone)
        loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
        features = cascade.features(images, DISPATCHER, accelerator=accelerator, **loading).features
        if accelerator.is_main_process:
            (folder / CASCADE_NAME).unlink(missing_ok=True)
            kind, dim, seed = options.router, options.router_dim, options.router_seed
            router = fit_router(features, options.experts, kind=kind, dim=dim, seed=seed)
            check_clusters(router.sizes, arguments.batch_size)
            write_clusters(folder, router.assign(features), options.experts)
            router.save(folder)
        accelerator.wait_for_everyone()
        router = Router.load(folder)
    check_clusters(router.sizes, arguments.batch_size)
    return router, images


def train_experts(arguments: TrainArguments, options: CascadeArguments, numbers: Sequence[int]) -> None:
    """Train some of the experts, after [`prepare`]; one that is done is left alone.

    Args:
        arguments: Of the dispatcher; `output_dir` is the cascade's folder.
        options: Of the cascade.
        numbers: Which experts, from 0.

    Raises:
        ValueError: If there is no such expert, dispatcher and router are not there, or they are of other settings.
    """
    _check(arguments, options)
    if unknown := [number for number in numbers if not 0 <= number < options.experts]:
        raise ValueError(f"There is no expert {unknown[0]}: they count from 0 to {options.experts - 1}.")
    folder, dispatcher = Path(arguments.output_dir), _dispatcher_arguments(arguments)
    router = _known_router(folder, options)
    if finished_run(dispatcher) is None or router is None:
        raise ValueError(
            f"{folder} holds no finished dispatcher with a router of these settings: make both first, by prepare(…) "
            "or `smn cascade train … --prepare`, and then the experts, in any order."
        )
    _train_experts(arguments, router, build_images(dispatcher).train, numbers, build_accelerator(arguments))


def _check(arguments: TrainArguments, options: CascadeArguments) -> None:
    check_run(arguments)
    if options.ensemble and not arguments.pretrained:
        raise ValueError("ensemble needs one base, and with pretrained=False each seed has its own: leave it out.")


def _dispatcher_arguments(arguments: TrainArguments) -> TrainArguments:
    return replace(arguments, output_dir=str(Path(arguments.output_dir) / DISPATCHER), resume=True)


def _refuse_finished(folder: Path, options: CascadeArguments) -> None:
    """Leave a whole cascade as it is: its experts are of its own clusters, so other ones would only be refused."""
    if (folder / CASCADE_NAME).is_file() and (folder / ROUTER_NAME).is_file():
        found = Router.load(folder)
        fitted = {"router": found.kind, "experts": found.experts, "router_dim": found.dim, "router_seed": found.seed}
        asked = {key: getattr(options, key) for key in fitted}
        differing = [f"{key}: was {was!r}, is {asked[key]!r}" for key, was in fitted.items() if was != asked[key]]
        raise ValueError(
            f"{folder} holds a finished cascade of other settings ({'; '.join(differing)}): take the old ones, or "
            f"another output_dir, into which its folder {DISPATCHER} may be copied."
        )


def _known_router(folder: Path, options: CascadeArguments) -> Router | None:
    """The router that was fitted with these options, if there is one."""
    if not (folder / ROUTER_NAME).is_file():
        return None
    router = Router.load(folder)
    asked = (options.router, options.experts, options.router_dim, options.router_seed)
    return router if (router.kind, router.experts, router.dim, router.seed) == asked else None


def _train_experts(
    arguments: TrainArguments, router: Router, images: ImageDataset, numbers: Sequence[int], accelerator: Accelerator
) -> None:
    folder = Path(arguments.output_dir)
    for number in numbers:
        mine = expert_arguments(arguments, folder, number, len(images), router.sizes[number])
        assert mine.indices_file is not None
        cluster = images.subset(read_indices(mine.indices_file, len(images)))
        if train_once(mine, cluster) and accelerator.is_main_process:
            (folder / CASCADE_NAME).unlink(missing_ok=True)
        accelerator.wait_for_everyone()


def _fit_projections(
    cascade: Cascade,
    arguments: TrainArguments,
    options: CascadeArguments,
    images: ImageDataset,
    accelerator: Accelerator,
) -> None:
    loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    cascade.fit_projections(images, options.embed_dim, accelerator=accelerator, **loading)


def _is_done(folder: Path, names: Sequence[str], options: CascadeArguments) -> bool:
    if not (folder / CASCADE_NAME).is_file():
        return False
    parts = CascadeParts.load(folder)
    return (list(parts.adapters), parts.embed_dim) == (list(names), options.embed_dim)


def _fit_ensemble(
    arguments: TrainArguments, options: CascadeArguments, images: ImageDataset, accelerator: Accelerator
) -> None:
    """The control: as many masks, each a dispatcher on all images with a seed of its own, combined in the same way."""
    folder = Path(arguments.output_dir)
    seeds = {f"seed-{seed}": seed for seed in range(arguments.seed + 1, arguments.seed + 1 + options.experts)}
    trained = False
    for name, seed in seeds.items():
        mine = replace(_dispatcher_arguments(arguments), seed=seed, output_dir=str(folder / _SEEDS / name))
        trained |= train_once(mine)
    if trained or not _is_done(folder / ENSEMBLE, [DISPATCHER, *seeds], options):
        runs = {name: folder / _SEEDS / name for name in seeds}
        runs = {DISPATCHER: folder / DISPATCHER, **runs}
        ensemble = Cascade.from_runs(runs, backbone=arguments.backbone)
        _fit_projections(ensemble, arguments, options, images, accelerator)
        if accelerator.is_main_process:
            ensemble.save(folder / ENSEMBLE)
    accelerator.wait_for_everyone()
