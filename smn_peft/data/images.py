# SPDX-License-Identifier: Apache-2.0
"""`load_images`: from a name or a path to an `ImageDataset`."""

from __future__ import annotations

import os

from .dataset import ImageDataset
from .errors import WITHOUT_LABELS, NoLabelsError
from .hub import load_hub, load_parquet
from .local import load_folder, load_npz, parquet_files, standard_split
from .registry import dataset_spec

__all__ = ["load_images"]


def load_images(
    name_or_path: str | os.PathLike[str],
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    labelled: bool = True,
    cache: bool | int = False,
) -> ImageDataset:
    """Images by name or path.

    Args:
        name_or_path: A dataset of the paper ("cifar10", see `list_datasets`), whose columns and splits are known; any
            id on the Hub ("user/dataset", or "user/dataset:config"); a folder of images (``split/class/…``,
            ``class/…`` or unlabelled) or of parquet files; a parquet file or pattern; or an npz of `jpeg` and
            `offsets`. What exists on disk comes first.
        split: "train" or "test"; for a Hub id whatever it has.
        image_column: Column of the images (Hub and parquet), found by itself where there is only one.
        label_column: Column of the class (Hub and parquet).
        revision: Branch, tag or commit on the Hub.
        labelled: False ignores labels and needs none.
        cache: True holds decoded images in memory up to 2 GiB, a number up to that many bytes; see
            `ImageDataset.cached`.

    Raises:
        ValueError: Unknown name, split or column, or no images.
        NoLabelsError: Labels are missing or all the same; it is a ValueError.
        OSError: Not in the local cache and the Hub cannot be reached.
    """
    name = os.fspath(name_or_path)
    dataset = _load(name, split, image_column, label_column, revision, labelled)
    if dataset.labels is not None and bool((dataset.labels == dataset.labels[0]).all()):
        label = int(dataset.labels[0])
        shown = dataset.classes[label] if dataset.classes else label
        raise NoLabelsError(
            f"All {len(dataset)} images of {name}, split {split!r}, are of one class ({shown}), so nothing can be "
            f"told apart: check the labels, or pass {WITHOUT_LABELS}."
        )
    if cache is False:
        return dataset
    return dataset.cached() if cache is True else dataset.cached(cache)


def _load(
    name: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    labelled: bool,
) -> ImageDataset:
    columns = {"image_column": image_column, "label_column": label_column}
    if name.endswith(".parquet"):
        return load_parquet(name, split, **columns, labelled=labelled)
    if os.path.isdir(name) and revision is None and (tables := parquet_files(name)):
        return load_parquet(tables, standard_split(split), **columns, labelled=labelled, name=name)
    if os.path.isdir(name) or name.endswith(".npz"):
        given = [key for key, value in {**columns, "revision": revision}.items() if value is not None]
        if given:
            raise ValueError(f"{name} is no table and no repository: leave out {', '.join(given)}.")
        return load_folder(name, split, labelled=labelled) if os.path.isdir(name) else _npz(name, split, labelled)
    if os.path.exists(name):
        raise ValueError(f"{name} is a file of an unknown kind: pass a folder, a .parquet or a .npz file.")
    if "/" in name:
        hub_id, _, config = name.partition(":")
        return load_hub(hub_id, split, config=config or None, **columns, revision=revision, labelled=labelled)
    spec = dataset_spec(name)
    if spec.hub_id is None:
        raise ValueError(f"{name} is not on the Hub in the paper's form. {spec.notes}")
    splits = {"train": spec.train, "test": spec.test}
    if split not in splits:
        raise ValueError(f"{name} has the splits 'train' and 'test', as in the paper; got {split!r}.")
    return load_hub(
        spec.hub_id,
        splits[split],
        config=spec.config,
        image_column=image_column or spec.image_column,
        label_column=label_column or spec.label_column,
        revision=revision,
        labelled=labelled,
        name=name,
    )


def _npz(name: str, split: str, labelled: bool) -> ImageDataset:
    if not os.path.exists(name):
        raise FileNotFoundError(f"{name} does not exist.")
    return load_npz(name, split, labelled=labelled)
