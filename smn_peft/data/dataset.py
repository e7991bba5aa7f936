# SPDX-License-Identifier: Apache-2.0
"""`ImageDataset`: images by index, as uint8 RGB tensors with their labels, wherever they are; subsets by label."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..functional.features import whole_numbers
from ..storage.files import read_bytes
from .decoding import ImageError, decode_rgb

__all__ = [
    "WITHOUT_LABELS",
    "EncodedImages",
    "ImageDataset",
    "ImageSource",
    "NoLabelsError",
    "NoSplitError",
    "held_out",
    "label_subset",
    "stored_image",
]

_MAX_FILE = 1 << 28  # bytes, those of the largest image that is decoded
WITHOUT_LABELS = "labelled=False to use the images without labels"


class NoLabelsError(ValueError):
    """There are no labels, or none that tell anything apart; the images themselves may be fine."""


class NoSplitError(ValueError):
    """There is no such split; `there` names those that there are, as far as they are known."""

    def __init__(self, message: str, there: Iterable[str]) -> None:
        super().__init__(message)
        self.there = tuple(there)


class ImageSource(Protocol):
    """Where image files are read; it travels to workers."""

    def read(self, row: int) -> tuple[Tensor | bytes, str]:
        """The bytes of one image file, and its name for messages."""


class EncodedImages:
    """Image files one after another in one array."""

    def __init__(self, data: Tensor, offsets: Tensor, name: str) -> None:
        self._data, self._offsets, self._name = data, offsets, name

    def read(self, row: int) -> tuple[Tensor, str]:
        """The bytes of a row, and its name."""
        start, end = self._offsets[row : row + 2].tolist()
        return self._data[start:end], f"{self._name}, row {row}"


def stored_image(value: Mapping[str, Any] | None, where: str, folders: list[Path]) -> tuple[bytes, str]:
    """The bytes of an image of `datasets`, and the names of its row and file.

    A row may name a file below `folders` only, since anybody wrote it; `ImageError` for another.
    """
    value = value or {"bytes": b"", "path": None}
    where += f" ({value['path']})" if value["path"] else ""
    if value["bytes"] is not None:
        return value["bytes"], where
    for folder in map(Path.resolve, folders):
        found = (folder / str(value["path"])).resolve()  # an absolute path stays what it is
        if found.is_relative_to(folder) and found.exists():
            try:
                return read_bytes(found, _MAX_FILE), where
            except ValueError as error:
                raise ImageError(f"{where}: {error}") from error
    what = f"the row has no bytes, and names a file that is not below {folders[0]}, the dataset's own folder"
    raise ImageError(f"{where}: {what}. Put the bytes into the table, or the files beside it.")


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset[dict[str, Any]]):
    """Images by index.

    `dataset[i]` is ``{"image": (3, height, width) uint8 RGB, "label": int (if labelled), "index": i}``. An image that
    cannot be read raises `ImageError` with its file or row when it is asked for.
    """

    source: ImageSource
    _: KW_ONLY
    labels: Tensor | None  # (n,) whole numbers
    classes: list[str] | None  # names by label
    name: str
    split: str
    rows: Tensor  # (n,) int64 rows of the source that this dataset has, in order
    revision: str | None = None  # commit on the Hub
    _cache: dict[int, Tensor] = field(default_factory=dict)  # (height, width, 3) by row

    def __post_init__(self) -> None:
        where, count = f"{self.name}, split {self.split!r}", len(self.rows)
        if count == 0:
            raise ValueError(f"{where}, has no images: check the name, the split and the indices.")
        if self.labels is not None:
            if len(self.labels) != count:
                raise ValueError(f"{where}, has {count} images but {len(self.labels)} labels.")
            self.labels = whole_numbers(self.labels, where)
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0:
                what = f"{where}, has the label {low}, which stands for an unknown class"
                raise NoLabelsError(f"{what}: take another split, or {WITHOUT_LABELS}.")
            if self.classes is not None and high >= len(self.classes):
                raise ValueError(f"{where}, has the label {high} but only {len(self.classes)} class names.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images; there is no index {index}.")
        index = int(index) % len(self)
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {"image": self._image(index), "index": index, **label}

    @property
    def has_keys(self) -> bool:
        """Whether images may have names."""
        return hasattr(self.source, "key")

    def key(self, index: int) -> str | None:
        """The name of an image's file within the dataset, of one that [`has_keys`]; None where it has none."""
        name: str | None = self.source.key(int(self.rows[index]))  # type: ignore[attr-defined]
        return name

    @property
    def num_classes(self) -> int | None:
        """Number of names if there are names, else the largest label plus one; None without labels."""
        if self.labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    def digest(self, images: int = 64) -> str:
        """SHA-256, as hex, of number, labels and the files of some images; the same for a folder and for its npz."""
        digest = hashlib.sha256(str(len(self)).encode())
        if self.labels is not None:
            digest.update(self.labels.to(torch.int64).contiguous().numpy().tobytes())
        for index in torch.linspace(0, len(self) - 1, min(images, len(self))).long().tolist():
            data, _ = self.source.read(int(self.rows[index]))
            content = data.contiguous().numpy().tobytes() if isinstance(data, Tensor) else data
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def subset(self, indices: Iterable[int] | Tensor) -> ImageDataset:
        """The images at these indices, in this order, counted from 0 anew; ValueError for one outside."""
        given = indices if isinstance(indices, Tensor) else list(indices)
        chosen = whole_numbers(given, f"A subset of {self.name}", "index")
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            got = chosen.tolist()[:5]
            raise ValueError(f"Indices of a subset of {self.name} must lie in [0, {len(self)}); got {got}.")
        labels, rows = None if self.labels is None else self.labels[chosen], self.rows[chosen]
        cache = {row: self._cache[row] for row in rows.tolist() if row in self._cache}
        return replace(self, labels=labels, rows=rows, _cache=cache)

    def first_classes(self, count: int) -> ImageDataset:
        """The images of the first `count` classes alone; ValueError if there are not so many, or no images."""
        found = self.num_classes
        if self.labels is None or found is None or not 1 <= count <= found:
            raise ValueError(f"{self.name} has {found or 'no'} classes; got class_limit={count}.")
        part = self.subset((self.labels < count).nonzero().squeeze(1))
        return replace(part, classes=None if part.classes is None else part.classes[:count])

    def without_labels(self) -> ImageDataset:
        """The same images, unlabelled."""
        return replace(self, labels=None)

    def cached(self, max_bytes: int = 2**31) -> ImageDataset:
        """The same images, decoded once and held in memory, which workers share.

        Images are taken in order until the next would exceed `max_bytes`; the rest is read as before.
        """
        held, pixels = 0, []
        for index in range(len(self)):
            image = self._image(index)
            held += image.numel()
            if held > max_bytes:
                break
            pixels.append(image.permute(1, 2, 0).contiguous())
        # Views of one storage: one mapping to share, not one file descriptor per image.
        flat = torch.cat([image.flatten() for image in pixels] or [torch.empty(0, dtype=torch.uint8)])
        views = flat.split([image.numel() for image in pixels])
        kept = zip(self.rows.tolist(), views, pixels, strict=False)
        return replace(self, _cache={row: view.view(image.shape) for row, view, image in kept})

    def _image(self, index: int) -> Tensor:
        row = int(self.rows[index])
        if row in self._cache:
            return self._cache[row].permute(2, 0, 1)
        return decode_rgb(*self.source.read(row))


def label_subset(labels: Tensor, fraction: float, *, balanced: bool = True, seed: int = 0) -> Tensor:
    """Choose the images whose labels may be used, for low-shot learning (the paper's 10 … 0.25 %).

    With the same seed a smaller subset lies in every larger one of the same kind.

    Args:
        labels: (n,) whole numbers; a class is a value that occurs.
        fraction: Part of the images, in (0, 1]; at least one image, per class if balanced.
        balanced: Take the same number from every class, all of a class that has fewer than the fraction asks for;
            else so many at random, so that a class may be missing.
        seed: Seed of the random order.

    Returns:
        Sorted indices, (m,) int64.

    Raises:
        ValueError: No labels, or a fraction out of range.
    """
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be a vector of at least one label; got the shape {tuple(labels.shape)}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}. 1 % is 0.01.")
    labels, total = whole_numbers(labels, "labels"), len(labels)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if not balanced:
        return order[: max(1, round(fraction * total))].sort().values
    classes, shuffled = labels.unique(), labels[order]
    number = max(1, round(fraction * total / len(classes)))
    return torch.cat([order[shuffled == label][:number] for label in classes]).sort().values


def held_out(labels: Tensor, fraction: float, *, seed: int = 0) -> Tensor:
    """Choose images to evaluate on, evenly of every class, one at least and never all; the rest is to train on.

    Args:
        labels: (n,) whole numbers.
        fraction: Part of the images, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Sorted indices, (m,) int64.

    Raises:
        ValueError: The fraction is out of range, or no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"A fraction to hold out must lie in (0, 1); got {fraction}. 20 % is 0.2.")
    labels = whole_numbers(labels, "labels")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled, found = labels[order], []
    for label in labels.unique():
        of_class = order[shuffled == label]
        count = len(of_class)
        found.append(of_class[: min(max(1, round(fraction * count)), count - 1)])
    if not sum(map(len, found)):
        raise ValueError("No class has two images, so none can be held out: add some, or pass --eval-split none.")
    return torch.cat(found).sort().values
