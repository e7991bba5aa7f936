# SPDX-License-Identifier: Apache-2.0
"""Images from the disk: folders with or without classes, and an npz of concatenated image files."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..functional.features import whole_numbers
from ..storage import check_regular, read_bytes
from .dataset import ImageDataset
from .errors import WITHOUT_LABELS, NoLabelsError, NoSplitError

__all__ = ["EncodedImages", "ImageFiles", "load_folder", "load_npz", "parquet_files", "standard_split"]

_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val"), "test": ("test", "testing")}


class ImageFiles:
    """Image files by path."""

    def __init__(self, paths: list[str]) -> None:
        # One array, not a list: workers that are forked would copy every page of a list by counting references.
        self._paths = np.array(paths, dtype=np.str_)

    def read(self, row: int) -> tuple[bytes, str]:
        """The bytes of a file, and its path."""
        path = str(self._paths[row])
        return read_bytes(path), path


class EncodedImages:
    """Image files one after another in one array."""

    def __init__(self, data: Tensor, offsets: Tensor, name: str) -> None:
        self._data, self._offsets, self._name = data, offsets, name

    def read(self, row: int) -> tuple[Tensor, str]:
        """The bytes of a row, and its name."""
        start, end = self._offsets[row : row + 2].tolist()
        return self._data[start:end], f"{self._name}, row {row}"


def load_folder(path: str | os.PathLike[str], split: str, *, labelled: bool) -> ImageDataset:
    """Images of a folder: ``split/class/…``, ``class/…`` or, unlabelled, any files below it.

    Classes are the names of the folders in alphabetical order, over all splits. Without folders of splits everything
    is the split "train". Hidden files and files of other types are passed over.

    Args:
        path: The folder.
        split: "train", "validation" ("val") or "test", or the name of any folder that is a split.
        labelled: False takes all images below, labels or not.

    Raises:
        ValueError: No images, no such split, or no folders of classes where labels are needed.
    """
    root = Path(path)
    splits = {folder.name: folder for folder in _folders(root) if folder.name.lower() in sum(_SPLITS.values(), ())}
    standard = standard_split(split)
    start = next((splits[name] for name in (split, *_SPLITS.get(standard, ())) if name in splits), None)
    if start is None:
        if splits or split != "train":
            there = ", ".join(splits) if splits else "no folders of splits, so only split='train'"
            raise NoSplitError(f"{root} has no split {split!r}: it has {there}.", splits or ("train",))
        start = root
    if not labelled:
        return _files(root, split, [(file, 0) for file in _images(start)], None)
    parts = list(splits.values()) or [root]
    classes = sorted({folder.name for part in parts for folder in _folders(part) if _images(folder)})
    if not classes:
        raise NoLabelsError(
            f"{start} has no folders of classes, so no labels: put every class into its own folder, or pass "
            f"{WITHOUT_LABELS}."
        )
    found = [(file, label) for label, name in enumerate(classes) for file in _images(start / name)]
    return _files(root, split, found, classes)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(path: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    found = (Path(folder) / file for folder, _, files in os.walk(path, followlinks=True) for file in files)
    return sorted(file for file in found if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."))


def _files(root: Path, split: str, found: list[tuple[Path, int]], classes: list[str] | None) -> ImageDataset:
    if not found:
        raise ValueError(f"{root}, split {split!r}, has no images ({', '.join(sorted(_SUFFIXES))}).")
    return ImageDataset(
        ImageFiles([str(file) for file, _ in found]),
        labels=None if classes is None else torch.tensor([label for _, label in found]),
        classes=classes,
        name=str(root),
        split=split,
        rows=torch.arange(len(found)),
    )


def parquet_files(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Files of a folder of parquet by split: "train", "validation", "test"; empty where it holds an image.

    The split is told by a word in the name of a file or of a folder above it ("data/train-00000-of-00002.parquet", as
    on the Hub); where none tells any, all are "train".

    Raises:
        ValueError: Some names tell their split, and others do not.
    """
    root, found = Path(path), []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(Path(file).suffix.lower() in _SUFFIXES for file in files):
            return {}
        found += [Path(folder) / file for file in sorted(files) if file.endswith(".parquet") and file[0] != "."]
    splits: dict[str, list[str]] = {}
    for file in found:
        words = re.split(r"[^a-z]+", str(file.relative_to(root)).lower())
        split = next((key for key, names in _SPLITS.items() if {*names} & {*words}), "")
        splits.setdefault(split, []).append(str(file))
    unknown = splits.pop("", [])
    if unknown and splits:
        raise ValueError(
            f"{root}: the name of {unknown[0]} tells no split, and that of {next(iter(splits.values()))[0]} does: "
            "name a file, or a pattern such as 'folder/train-*.parquet'."
        )
    return {"train": unknown} if unknown else splits


def standard_split(split: str) -> str:
    """The usual name of a split: "validation" for "val"."""
    return next((key for key, names in _SPLITS.items() if split in names), split)


def load_npz(path: str | os.PathLike[str], split: str, *, labelled: bool) -> ImageDataset:
    """Images of an npz with `jpeg`, `offsets` and, as far as there are any, `label`, `split` and `classes`.

    `jpeg` is uint8, all image files one after another; image i is ``jpeg[offsets[i]:offsets[i + 1]]``. `split` is 0
    for training and 1 for test; without it everything is training.

    Raises:
        ValueError: Arrays are missing or do not fit together, an unknown split, or no labels where they are needed.
    """
    name = os.fspath(path)
    if split not in ("train", "test"):
        raise NoSplitError(f"{name} has no split {split!r}: an npz has 'train' and 'test'.", ("train", "test"))
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("jpeg", "offsets", "label", "split", "classes") if key in archive}
            there = ", ".join(archive.files)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{name} is not an npz file of arrays: {error}") from error
    for key in ("jpeg", "offsets", *(("label",) if labelled else ())):
        if key not in arrays:
            fix, kind = ("see load_npz", ValueError) if key != "label" else (f"pass {WITHOUT_LABELS}", NoLabelsError)
            raise kind(f"{name} has no array {key!r}; it has {there}: {fix}.")
    jpeg, offsets = arrays["jpeg"], arrays["offsets"].astype(np.int64)
    number = len(offsets) - 1
    if (
        jpeg.dtype != np.uint8
        or number < 1
        or offsets[0] < 0
        or offsets[-1] > len(jpeg)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{name}: offsets must rise from 0 to the {len(jpeg)} bytes of jpeg, which is uint8.")
    for key in ("label", "split"):
        if key in arrays and arrays[key].shape != (number,):
            raise ValueError(f"{name}: {key} has the shape {arrays[key].shape}, but there are {number} images.")
    parts = arrays.get("split", np.zeros(number, dtype=np.uint8))
    rows = torch.from_numpy(np.flatnonzero(parts == ("train", "test").index(split)))
    if len(rows) == 0:
        raise NoSplitError(f"{name}, split {split!r}, has no images.", {"train", "test"} - {split})
    return ImageDataset(
        EncodedImages(torch.from_numpy(jpeg), torch.from_numpy(offsets), name),
        labels=whole_numbers(arrays["label"], name)[rows] if labelled else None,
        classes=[str(label) for label in arrays["classes"]] if labelled and "classes" in arrays else None,
        name=name,
        split=split,
        rows=rows,
    )
