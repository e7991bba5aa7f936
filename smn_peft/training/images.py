# SPDX-License-Identifier: Apache-2.0
"""The images of a run: to train on, to vote in k-NN and to be tested on; and what successive runs share of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageDataset, NoLabelsError, NoSplitError, held_out, label_subset, load_images
from ..evaluation import Features
from ..storage.files import check_regular
from .arguments import TrainArguments, objective_kind


@dataclass(frozen=True)
class Images:
    """The images of a run: to train on, and, where labels are known, to vote in k-NN and to be tested on."""

    train: ImageDataset
    bank: ImageDataset | None
    test: ImageDataset | None
    num_classes: int | None = None
    """Of the whole training split, of which `train` may lack some."""
    eval_split: str | None = None
    """The split of `test`, which is another than the arguments' where that does not exist."""


def images_of_run(arguments: TrainArguments) -> tuple[TrainArguments, Images]:
    """Open the images, and set `eval_split` to what was taken; None, with a warning, if it lacks labels."""
    try:
        images = build_images(arguments)
        return replace(arguments, eval_split=images.eval_split), images
    except NoLabelsError as error:
        if objective_kind(arguments).needs_labels or arguments.eval_split is None:
            raise
        reason = str(error).partition(": ")[0]
        warnings.warn(f"{reason}: nothing is evaluated, as with --eval-split none.", stacklevel=3)
        arguments = replace(arguments, eval_split=None, eval_fraction=None)
        return arguments, build_images(arguments)


def build_images(arguments: TrainArguments) -> Images:
    """Open the dataset and choose the subsets that the arguments ask for; NoLabelsError if labels are missing."""
    needs_labels, seed = objective_kind(arguments).needs_labels, arguments.subset_seed
    labelled = needs_labels or arguments.eval_split is not None
    key = (
        *(arguments.dataset, arguments.image_column, arguments.label_column, arguments.dataset_revision, labelled),
        *(seed, arguments.class_limit, arguments.eval_fraction),
    )
    train = full = _load(arguments, arguments.train_split, labelled)
    held: ImageDataset | None = None
    if arguments.eval_fraction is not None:
        assert full.labels is not None  # eval_split is not None either
        chosen = held_out(full.labels, arguments.eval_fraction, seed=seed)
        rest = torch.ones(len(full), dtype=torch.bool)
        rest[chosen] = False
        train, held = full.subset(rest.nonzero().flatten()), full.subset(chosen)
    train = _limited(train, arguments.limit, seed)
    if arguments.cache_images:  # not before: decoding all images for a small part can take longer than training
        train = _shared("train", (*key, arguments.train_split, arguments.limit), train.cached)
    bank = train
    if arguments.fraction < 1.0:
        labels = torch.zeros(len(train), dtype=torch.int64) if train.labels is None else train.labels
        options: dict[str, Any] = {"balanced": arguments.balanced, "seed": arguments.fraction_seed}
        train = train.subset(label_subset(labels, fraction=arguments.fraction, **options))
    if arguments.indices_file is not None:
        train = train.subset(read_indices(arguments.indices_file, len(train)))
    if needs_labels and train.labels is not None and len(train.labels.unique()) < 2:
        what = f"{arguments.dataset} ({arguments.train_split}): the {len(train)} training images"
        raise ValueError(f"{what} are all of one class: take another split, or more images.")
    if arguments.eval_split is None:
        return Images(train, None, None, full.num_classes)
    test, split = (held, arguments.eval_split) if held is not None else _to_test_on(arguments, arguments.eval_split)
    test = _limited(test, arguments.eval_limit, seed)
    if arguments.cache_images:
        test = _shared("test", (*key, split, arguments.eval_limit), test.cached)
    return Images(train, _limited(bank, arguments.knn_limit, seed), test, full.num_classes, split)


def _to_test_on(arguments: TrainArguments, split: str) -> tuple[ImageDataset, str]:
    """The split to evaluate on, or the one for validation where there is no "test"; and its name."""
    try:
        try:
            return _load(arguments, split, True), split
        except NoSplitError as error:
            other = next((name for name in error.there if name.lower() in ("validation", "valid", "val")), None)
            if split != "test" or other is None:
                raise
            warnings.warn(f"{arguments.dataset} has no split 'test': {other!r} is evaluated on.", stacklevel=4)
            return _load(arguments, other, True), other
    except NoLabelsError:
        raise
    except ValueError as error:
        fix = "name another; hold images of the training split out, by --eval-fraction 0.2; or pass --eval-split none"
        raise ValueError(f"{error} It was opened to evaluate on: {fix}.") from error


def _load(arguments: TrainArguments, split: str, labelled: bool) -> ImageDataset:
    try:
        found = load_images(
            arguments.dataset,
            split,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            revision=arguments.dataset_revision,
            labelled=labelled or arguments.class_limit is not None,
        )
    except NoLabelsError as error:
        raise NoLabelsError(f"{error} In training: an objective such as swav, and --eval-split none.") from error
    return found if arguments.class_limit is None else found.first_classes(arguments.class_limit)


def _limited(images: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    """A seeded choice of `limit` images, in their order."""
    if limit is None or limit >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(sorted(order[:limit].tolist()))


def read_indices(path: str | Path, count: int) -> Tensor:
    """Read image numbers, int64 (n,), from a ``.npy`` file of distinct integers from 0 to `count` − 1."""
    try:
        check_regular(path)
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"indices_file={path} does not exist.") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"indices_file={path} is not a .npy file of integers: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        shown = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"indices_file={path} must hold one row of integers, one at least; it holds {shown}.")
    if found.min() < 0 or found.max() >= count or len(np.unique(found)) < len(found):
        held = f"it holds {len(found)} from {found.min()} to {found.max()}"
        raise ValueError(f"indices_file={path} must hold each number once, from 0 to {count - 1}; {held}.")
    return torch.from_numpy(found.astype(np.int64))


# --- What successive runs of a process share -------------------------------------------------------------------------

_SHARED: ContextVar[dict[str, tuple[Hashable, Any]] | None] = ContextVar("what runs share", default=None)


@contextmanager
def share() -> Iterator[None]:
    """Keep decoded images and the frozen base's features of them from one run to the next inside this context."""
    token = _SHARED.set({} if (held := _SHARED.get()) is None else held)
    try:
        yield
    finally:
        _SHARED.reset(token)


def _shared(purpose: str, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives, or gave last for the same purpose and key inside [`share`]."""
    held = _SHARED.get()
    if held is None:
        return make()
    if purpose not in held or held[purpose][0] != key:
        held.pop(purpose, None)  # free its memory first
        held[purpose] = key, make()
    return held[purpose][1]


def base_features(arguments: TrainArguments, images: ImageDataset, extract: Callable[[], Features]) -> Features:
    """Features of the frozen base by `extract`, or an earlier run's, of the same images cached inside [`share`]."""
    held = _SHARED.get() or {}
    purpose = next((name for name, (_, value) in held.items() if value is images), None)
    if purpose is None:
        return extract()
    names = ("backbone", "weights", "pretrained", "backbone_revision", "image_size", "batch_size", "channels_last")
    # A zero-shot run's features are projected; weights that no file gives are drawn from the seed.
    base = *(getattr(arguments, name) for name in names), arguments.objective == "zero_shot", arguments.seed
    features: Features = _shared(f"features of {purpose}", (held[purpose][0], base), extract)
    return features
