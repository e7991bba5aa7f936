# SPDX-License-Identifier: Apache-2.0
"""`load_images`: image datasets by name or path, from folders, npz and parquet files and the Hugging Face Hub."""

from __future__ import annotations

import functools
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional.features import whole_numbers
from ..storage.files import check_regular, read_bytes
from .dataset import WITHOUT_LABELS, EncodedImages, ImageDataset, NoLabelsError, NoSplitError, stored_image
from .registry import dataset_spec
from .streaming import ImageStream

__all__ = ["EncodedImages", "ImageFiles", "TableImages", "load_images", "load_table", "stream_images"]

_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val"), "test": ("test", "testing")}
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target")
_UNKNOWN_SPLIT = re.compile(r"(?i)(?:unknown|bad) split.*(?:one of|splits:) (\[.*\])", re.DOTALL)  # in `datasets`
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


class ImageFiles:
    """Image files by path; their keys are the paths from `root` on."""

    def __init__(self, paths: list[str], root: str | os.PathLike[str] = ".") -> None:
        self._root = root
        # One array, not a list: workers that are forked would copy every page of a list by counting references.
        self._paths = np.array(paths, dtype=np.str_)

    def read(self, row: int) -> tuple[bytes, str]:
        """The bytes of a file, and its path."""
        path = str(self._paths[row])
        return read_bytes(path), path

    def key(self, row: int) -> str:
        """The path of a file from the dataset's folder on."""
        return Path(os.path.relpath(self._paths[row], self._root)).as_posix()


class TableImages:
    """Images in a table of `datasets`; see [`stored_image`]."""

    def __init__(self, table: Any, column: str, name: str, folders: list[Path]) -> None:
        self._table, self._column, self._name, self._folders = table, column, name, folders

    def read(self, row: int) -> tuple[bytes, str]:
        """The bytes of a row's image, and the name of the row and its file."""
        return stored_image(self._table[row][self._column], f"{self._name}, row {row}", self._folders)

    def key(self, row: int) -> str | None:
        """The file that a row names, if any."""
        value: Mapping[str, Any] = self._table[row][self._column] or {"path": None}
        return value["path"]


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
    """Load images by name or path.

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
    columns = {"image_column": image_column, "label_column": label_column}
    dataset: ImageDataset = _load(name, split, revision, labelled, columns)
    if dataset.labels is not None and bool((dataset.labels == dataset.labels[0]).all()):
        label = int(dataset.labels[0])
        what = f"All {len(dataset)} images of {name}, split {split!r}, are of one class"
        shown = dataset.classes[label] if dataset.classes else label
        raise NoLabelsError(f"{what} ({shown}): check the labels, or pass {WITHOUT_LABELS}.")
    if cache is False:
        return dataset
    return dataset.cached() if cache is True else dataset.cached(cache)


def stream_images(
    name_or_path: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    labelled: bool = True,
) -> ImageStream:
    """Open images that are read in order from where they are, without a copy on this machine.

    The arguments are those of [`load_images`]. What is streamed is an id on the Hub; parquet files or tars of
    webdataset, as a folder, a path, a pattern, or the same at a URL that fsspec knows, such as ``hf://``.

    Raises:
        ValueError: Unknown name, split or column, or images that are no stream.
        NoLabelsError: There is no column of labels, or it holds no numbers; it is a ValueError.
        OSError: The Hub cannot be reached.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    found: ImageStream = _load(name_or_path, split, revision, labelled, columns, streaming=True)
    return found


def _load(
    name: str, split: str, revision: str | None, labelled: bool, columns: dict[str, Any], streaming: bool = False
) -> Any:
    table: Any = functools.partial(load_table, name=name, labelled=labelled, streaming=streaming, **columns)
    is_folder = os.path.isdir(name)
    kinds = {".parquet": "parquet", **({".tar": "webdataset"} if streaming else {})}
    for suffix, kind in kinds.items():
        if name.endswith(suffix):
            return table(kind, split, files={"train": [name]})
        if is_folder and revision is None and (tables := _table_files(Path(name), suffix)):
            return table(kind, _standard_split(split), files=tables)
    if name.endswith(".tar"):
        raise ValueError(f"{name} is a tar, which is read in order only: stream it, by streaming (--streaming).")
    if streaming and (is_folder or name.endswith(".npz")):
        what = f"{name} is read by index from this disk, without a copy"
        raise ValueError(f"{what}: leave out streaming, or name parquet files or tars.")
    if is_folder or name.endswith(".npz"):
        if given := [key for key, value in {**columns, "revision": revision}.items() if value is not None]:
            raise ValueError(f"{name} is no table and no repository: leave out {', '.join(given)}.")
        return _load_folder(Path(name), split, labelled) if is_folder else _load_npz(name, split, labelled)
    if os.path.exists(name):
        raise ValueError(f"{name} is a file of an unknown kind: pass a folder, a .parquet or a .npz file.")
    if "/" in name:
        hub_id, _, config = name.partition(":")
        return table(hub_id, split, name=hub_id, config=config or None, revision=revision)
    spec = dataset_spec(name)
    if spec.hub_id is None:
        raise ValueError(f"{name} is not on the Hub in the paper's form. {spec.notes}")
    splits = {"train": spec.train, "test": spec.test}
    if split not in splits:
        raise ValueError(f"{name} has the splits 'train' and 'test', as in the paper; got {split!r}.")
    columns = {key: column or getattr(spec, key) for key, column in columns.items()}
    return table(spec.hub_id, splits[split], revision=revision, **columns)


def _load_folder(root: Path, split: str, labelled: bool) -> ImageDataset:
    """Images of a folder: ``split/class/…``, ``class/…`` or, unlabelled, any files below it.

    Classes are the folders' names in order, over all splits; without folders of splits everything is "train".
    """
    splits = {folder.name: folder for folder in _folders(root) if folder.name.lower() in sum(_SPLITS.values(), ())}
    names = (split, *_SPLITS.get(_standard_split(split), ()))
    start = next((splits[name] for name in names if name in splits), root)
    if start is root and (splits or split != "train"):
        there = ", ".join(splits) if splits else "no folders of splits, so only split='train'"
        raise NoSplitError(f"{root} has no split {split!r}: it has {there}.", splits or ("train",))
    classes = None
    if labelled:
        folders = [folder for part in splits.values() or [root] for folder in _folders(part)]
        classes = sorted({folder.name for folder in folders if any(_files(folder))})
        if not classes:
            what = f"{start} has no folders of classes, so no labels"
            raise NoLabelsError(f"{what}: put every class into its own folder, or pass {WITHOUT_LABELS}.")
        found = [(str(file), label) for label, name in enumerate(classes) for file in sorted(_files(start / name))]
    else:
        found = [(str(file), 0) for file in sorted(_files(start))]
    if not found:
        raise ValueError(f"{root}, split {split!r}, has no images ({', '.join(sorted(_SUFFIXES))}).")
    labels = torch.tensor([label for _, label in found]) if labelled else None
    source, rows = ImageFiles([file for file, _ in found], root), torch.arange(len(found))
    return ImageDataset(source, labels=labels, classes=classes, name=str(root), split=split, rows=rows)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, suffixes: Collection[str] = _SUFFIXES) -> Iterator[Path]:
    """The files below a folder that end so, without hidden ones."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in suffixes:
                yield Path(folder, file)


def _standard_split(split: str) -> str:
    """The usual name of a split: "validation" for "val"."""
    return next((key for key, names in _SPLITS.items() if split in names), split)


def _table_files(root: Path, suffix: str) -> dict[str, list[str]]:
    """Files of a folder that end so by split, told by a word in their paths; empty where it holds an image.

    Where no path tells a split, all are "train".
    """
    if any(_files(root)):
        return {}
    splits: dict[str, list[str]] = {}
    for file in sorted(_files(root, {suffix})):
        words = {*re.split(r"[^a-z]+", str(file.relative_to(root)).lower())}
        split = next((key for key, names in _SPLITS.items() if words & {*names}), "")
        splits.setdefault(split, []).append(str(file))
    unknown = splits.pop("", [])
    if unknown and splits:
        told = next(iter(splits.values()))[0]
        what = f"{root}: the name of {unknown[0]} tells no split, and that of {told} does"
        raise ValueError(f"{what}: name a file, or a pattern such as 'folder/train-*{suffix}'.")
    return {"train": unknown} if unknown else splits


def _load_npz(name: str, split: str, labelled: bool) -> ImageDataset:
    """Images of an npz: image file i is ``jpeg[offsets[i]:offsets[i + 1]]``, uint8.

    Optional are `label`, `classes`, and `split`: 0 for training, which is the default, and 1 for test.
    """
    if not os.path.exists(name):
        raise FileNotFoundError(f"{name} does not exist.")
    if split not in ("train", "test"):
        raise NoSplitError(f"{name} has no split {split!r}: an npz has 'train' and 'test'.", ("train", "test"))
    check_regular(name)
    try:
        with np.load(name, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("jpeg", "offsets", "label", "split", "classes") if key in archive}
            there = ", ".join(archive.files)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{name} is not an npz file of arrays: {error}") from error
    if absent := [key for key in ("jpeg", "offsets") if key not in arrays]:
        raise ValueError(f"{name} has no array {absent[0]!r}; it has {there}: see the help of load_images.")
    if labelled and "label" not in arrays:
        raise NoLabelsError(f"{name} has no array 'label'; it has {there}: pass {WITHOUT_LABELS}.")
    jpeg, offsets = arrays["jpeg"], arrays["offsets"].astype(np.int64)
    number = len(offsets) - 1
    bounds = number > 0 and offsets[0] >= 0 and offsets[-1] <= len(jpeg) and not (np.diff(offsets) < 0).any()
    if jpeg.dtype != np.uint8 or not bounds:
        raise ValueError(f"{name}: offsets must rise from 0 to the {len(jpeg)} bytes of jpeg, which is uint8.")
    for key in ("label", "split"):
        if key in arrays and arrays[key].shape != (number,):
            raise ValueError(f"{name}: {key} has the shape {arrays[key].shape}, but there are {number} images.")
    parts = arrays.get("split", np.zeros(number, dtype=np.uint8))
    rows = torch.from_numpy(np.flatnonzero(parts == ("train", "test").index(split)))
    if len(rows) == 0:
        raise NoSplitError(f"{name}, split {split!r}, has no images.", {"train", "test"} - {split})
    labels = whole_numbers(arrays["label"], name)[rows] if labelled else None
    classes = list(map(str, arrays["classes"])) if labelled and "classes" in arrays else None
    source = EncodedImages(torch.from_numpy(jpeg), torch.from_numpy(offsets), name)
    return ImageDataset(source, labels=labels, classes=classes, name=name, split=split, rows=rows)


def load_table(
    source: str,
    split: str,
    *,
    name: str,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    labelled: bool = True,
    files: Mapping[str, list[str]] | None = None,
    streaming: bool = False,
) -> ImageDataset | ImageStream:
    """Load a repository of the Hub, or parquet files ("parquet", with files or patterns by split), by `datasets`.

    With `streaming` the result is an `ImageStream`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets of the Hub and parquet files need: pip install 'smn_peft[data]'") from error
    try:
        table: Any = datasets.load_dataset(
            source,
            config,
            split=split,
            revision=revision,
            trust_remote_code=False,
            data_files=files,
            streaming=streaming,
        )
    except ValueError as error:  # split and configuration; the library names those that exist
        if (found := _UNKNOWN_SPLIT.search(str(error))) is None:
            raise ValueError(f"{name}, split {split!r}: {error}") from error
        raise NoSplitError(f"{name}, split {split!r}: {error}", re.findall(r"'([^']*)'", found[1])) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise OSError(f"{name} is not on the Hub, or cannot be read without hf auth login: {error}") from error
    except ConnectionError as error:
        what = f"{name} is not in the local cache and the Hub cannot be reached ({error})"
        fix = "Go online once (unset HF_HUB_OFFLINE), or copy the cache of a machine that has it"
        raise OSError(f"{what}. {fix}.") from error
    if table.features is None:
        raise ValueError(f"{name} cannot be streamed: its files do not say what columns they have, as parquet does.")
    features, there = table.features, ", ".join(table.features)
    for argument, column in (("image_column", image_column), ("label_column", label_column if labelled else None)):
        if column is not None and column not in features:
            raise ValueError(f"{name} has no column {column!r}; pass {argument}=, one of {there}.")
    if image_column is None:
        own = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        # Parquet that was not written by `datasets` holds the same record without saying that it is an image.
        own = own or [key for key, f in features.items() if isinstance(f, Mapping) and {"bytes", "path"} <= set(f)]
        if len(own) != 1:
            raise ValueError(f"{name} has {len(own) or 'no'} columns of images; pass image_column=, one of {there}.")
        image_column = own[0]
    folders = _own_folders(source, files)
    if streaming:
        label_column = _label_column(features, label_column, name) if labelled else None
        images = table.select_columns([image_column, *([] if label_column is None else [label_column])])
        images = images.cast_column(image_column, datasets.Image(decode=False))
        return ImageStream(images, image_column, label_column, name=name, split=split, folders=folders)
    labels, classes = _labels(table, label_column, name) if labelled else (None, None)
    checksums = table.info.download_checksums or {}
    commit = next((found[1] for key in checksums if (found := _COMMIT.search(key))), revision)
    # Bytes as they are stored: decoding is ours, so that an error can name the row.
    images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageDataset(
        TableImages(images, image_column, name, folders),
        labels=labels,
        classes=classes,
        name=name,
        split=split,
        revision=commit,
        rows=torch.arange(len(table)),
    )


def _own_folders(source: str, files: Mapping[str, list[str]] | None) -> list[Path]:
    """Where files of the dataset lie: beside the table, or, of the Hub, where its own files are cached."""
    if files is None:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        own = Path(HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
        return [own, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
    named = [file for part in files.values() for file in part]
    paths = [Path(re.split(r"[*?\[]", file, maxsplit=1)[0]) for file in named]  # what a pattern's wildcards follow
    return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))


def _labels(table: Any, column: str | None, name: str) -> tuple[Tensor, list[str] | None]:
    """Labels and names of the classes; strings are numbered in alphabetical order."""
    features, there = table.features, ", ".join(table.column_names)
    column = _label_column(features, column, name)
    values = table.select_columns([column])[:][column]
    if any(value is None for value in values):
        raise NoLabelsError(f"{name} has rows without a value in {column!r}: filter them, or pass {WITHOUT_LABELS}.")
    if values and isinstance(values[0], str):
        numbers = {label: number for number, label in enumerate(sorted(set(values)))}
        return torch.tensor([numbers[value] for value in values]), list(numbers)
    if values and not isinstance(values[0], int):
        what = f"The column {column!r} of {name} holds {type(values[0]).__name__}, no class"
        raise ValueError(f"{what}; pass label_column=, one of {there}.")
    return torch.tensor(values, dtype=torch.int64), getattr(features[column], "names", None)


def _label_column(features: Mapping[str, Any], column: str | None, name: str) -> str:
    """The column of the labels, found by itself if it is not given."""
    import datasets

    if column is None:
        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        column = next(iter(classes if len(classes) == 1 else [key for key in _LABEL_NAMES if key in features]), None)
    if column is None:
        there = ", ".join(features)
        raise NoLabelsError(f"{name} has no label column; it has {there}: pass label_column=, or {WITHOUT_LABELS}.")
    return column
