# SPDX-License-Identifier: Apache-2.0
"""The images of a run: which split and subset is trained on, which votes in k-NN, and which is tested on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..data import ImageDataset, NoLabelsError, NoSplitError, held_out, label_subset, load_images
from .objective import objective_kind
from .shared import decoded
from .start import read_indices
from .train_arguments import TrainArguments

__all__ = ["Images", "build_images"]

_INSTEAD_OF_TEST = ("validation", "valid", "val")


@dataclass(frozen=True)
class Images:
    """The images of a run: to train on, and, where labels are known, to vote in k-NN and to be tested on."""

    train: ImageDataset
    bank: ImageDataset | None
    test: ImageDataset | None
    num_classes: int | None = None
    """Of the whole training split, of which `train` may lack some."""
    eval_split: str | None = None
    """The split that was taken to test on, which is another than the arguments' where that does not exist."""


def build_images(arguments: TrainArguments) -> Images:
    """Open the dataset and choose the subsets that the arguments ask for.

    Raises:
        ValueError: If labels are needed and missing, a subset is empty, or `indices_file` does not fit.
        NoLabelsError: If labels are missing.
    """
    needs_labels = objective_kind(arguments).needs_labels
    where: dict[str, Any] = {
        "image_column": arguments.image_column,
        "label_column": arguments.label_column,
        "revision": arguments.dataset_revision,
    }
    labelled = needs_labels or arguments.eval_split is not None
    key = (
        *(arguments.dataset, *where.values(), labelled),
        *(arguments.subset_seed, arguments.class_limit, arguments.eval_fraction),
    )
    train = full = _load(arguments, arguments.train_split, labelled, where)
    held: ImageDataset | None = None
    if arguments.eval_fraction is not None:
        assert full.labels is not None  # eval_split is not None either
        chosen = held_out(full.labels, arguments.eval_fraction, seed=arguments.subset_seed)
        rest = torch.ones(len(full), dtype=torch.bool)
        rest[chosen] = False
        train, held = full.subset(rest.nonzero().flatten()), full.subset(chosen)
    if arguments.limit is not None and arguments.limit < len(train):
        train = train.subset(_choose(len(train), arguments.limit, arguments.subset_seed))
    if arguments.cache_images:  # not before: decoding all images for a small part can take longer than training
        train = decoded(train, "train", (*key, arguments.train_split, arguments.limit))
    bank = train
    if arguments.fraction < 1.0:
        labels = torch.zeros(len(train), dtype=torch.int64) if train.labels is None else train.labels
        train = train.subset(
            label_subset(
                labels, fraction=arguments.fraction, balanced=arguments.balanced, seed=arguments.fraction_seed
            )
        )
    if arguments.indices_file is not None:
        train = train.subset(read_indices(arguments.indices_file, len(train)))
    if needs_labels and train.labels is not None and len(train.labels.unique()) < 2:
        raise ValueError(
            f"{arguments.dataset} ({arguments.train_split}): the {len(train)} training images are all of one class, "
            "from which nothing can be learned. Take another split, or more images."
        )
    if arguments.eval_split is None:
        return Images(train, None, None, full.num_classes)
    test, split = (held, arguments.eval_split) if held is not None else _to_test_on(arguments, where)
    if arguments.eval_limit is not None and arguments.eval_limit < len(test):
        test = test.subset(_choose(len(test), arguments.eval_limit, arguments.subset_seed))
    if arguments.cache_images:
        test = decoded(test, "test", (*key, split, arguments.eval_limit))
    if arguments.knn_limit is not None and arguments.knn_limit < len(bank):
        bank = bank.subset(_choose(len(bank), arguments.knn_limit, arguments.subset_seed))
    return Images(train, bank, test, full.num_classes, split)


def _to_test_on(arguments: TrainArguments, where: dict[str, Any]) -> tuple[ImageDataset, str]:
    """The split to evaluate on; where there is no "test", the one for validation. And its name."""
    split = arguments.eval_split or "test"
    try:
        try:
            return _load(arguments, split, True, where), split
        except NoSplitError as error:
            other = next((name for name in error.there if name.lower() in _INSTEAD_OF_TEST), None)
            if split != "test" or other is None:
                raise
            warnings.warn(f"{arguments.dataset} has no split 'test': {other!r} is evaluated on.", stacklevel=4)
            return _load(arguments, other, True, where), other
    except NoLabelsError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{error} It was opened to evaluate on: name another split; or hold images of the training split out for "
            "it, by --eval-fraction 0.2; training can do without, by --eval-split none."
        ) from error


def _load(arguments: TrainArguments, split: str, labelled: bool, where: dict[str, Any]) -> ImageDataset:
    labelled = labelled or arguments.class_limit is not None
    try:
        found = load_images(arguments.dataset, split, labelled=labelled, **where)
    except NoLabelsError as error:
        raise NoLabelsError(f"{error} In training: an objective such as swav, and --eval-split none.") from error
    return found if arguments.class_limit is None else found.first_classes(arguments.class_limit)


def _choose(count: int, wanted: int, seed: int) -> list[int]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())
