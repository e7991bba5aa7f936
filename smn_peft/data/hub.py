# SPDX-License-Identifier: Apache-2.0
"""Images from the Hugging Face Hub and from parquet files, through the library `datasets`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..storage import read_bytes
from .dataset import ImageDataset
from .decoding import ImageError
from .errors import WITHOUT_LABELS, NoLabelsError, NoSplitError

__all__ = ["TableImages", "load_hub", "load_parquet"]

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target")
_UNKNOWN_SPLIT = re.compile(r"(?i)unknown split .*should be one of (\[.*\])", re.DOTALL)  # as `datasets` says it
_MAX_FILE = 1 << 28  # bytes, those of the largest image that is decoded
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


class TableImages:
    """Images in the rows of a table of `datasets`."""

    def __init__(self, table: Any, column: str, name: str, folders: list[Path]) -> None:
        """Take a column; a row may name files below `folders` only, the dataset's own, since anybody wrote it."""
        self._table, self._column, self._name = table, column, name
        self._folders = [folder.resolve() for folder in folders]

    def read(self, row: int) -> tuple[bytes, str]:
        """The bytes of a row's image, and the name of the row and its file."""
        value: Mapping[str, Any] | None = self._table[row][self._column]
        where = f"{self._name}, row {row}"
        if value is None:
            return b"", where
        if value["path"]:
            where += f" ({value['path']})"
        if value["bytes"] is not None:
            return value["bytes"], where
        return self._file(str(value["path"]), where), where

    def _file(self, path: str, where: str) -> bytes:
        for folder in self._folders:
            found = (folder / path).resolve()  # an absolute path stays what it is
            if found.is_relative_to(folder) and found.exists():
                try:
                    return read_bytes(found, _MAX_FILE)
                except ValueError as error:
                    raise ImageError(f"{where}: {error}") from error
        raise ImageError(
            f"{where}: the row has no bytes, and names a file that is not below {self._folders[0]}, the dataset's own "
            "folder, where alone it is read. Put the bytes into the table, or the files beside it."
        )


def load_hub(
    hub_id: str,
    split: str,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    labelled: bool = True,
    name: str | None = None,
) -> ImageDataset:
    """Images of a dataset on the Hub, downloaded once.

    Args:
        hub_id: Repository, such as "uoft-cs/cifar10".
        split: Split expression of `datasets`, such as "train+validation".
        config: Configuration, None for the default.
        image_column: Column of the images; None takes the only one that holds images.
        label_column: Column of the class; None takes the only class column, or one with a usual name.
        revision: Branch, tag or commit.
        labelled: False leaves labels out.
        name: Name of the result, `hub_id` by default.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: Unknown split, configuration or column; those that exist are named.
        OSError: Neither in the cache nor reachable.
    """
    return _load(hub_id, config, split, image_column, label_column, revision, labelled, name or hub_id)


def load_parquet(
    path: str | Mapping[str, list[str]],
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    name: str | None = None,
) -> ImageDataset:
    """Images of parquet files; arguments and errors as of `load_hub`.

    Args:
        path: A file, or a pattern such as "folder/train-*.parquet", of which all is the split "train"; or files by
            split.
        split: "train", or a part of it such as "train[:10%]".
        image_column: Column of the images.
        label_column: Column of the class.
        labelled: False leaves labels out.
        name: Name of the result, `path` by default.
    """
    return _load(
        "parquet", None, split, image_column, label_column, None, labelled, name or str(path), data_files=path
    )


def _load(
    builder: str,
    config: str | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
    revision: str | None,
    labelled: bool,
    name: str,
    **options: Any,
) -> ImageDataset:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Reading datasets of the Hub and parquet files needs: pip install 'smn_peft[data]'"
        ) from error
    try:
        table = datasets.load_dataset(
            builder, config, split=split, revision=revision, trust_remote_code=False, **options
        )
    except ValueError as error:  # split and configuration; the library names those that exist
        if (found := _UNKNOWN_SPLIT.search(str(error))) is None:
            raise ValueError(f"{name}, split {split!r}: {error}") from error
        raise NoSplitError(f"{name}, split {split!r}: {error}", re.findall(r"'([^']*)'", found[1])) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise OSError(
            f"{name} does not exist on the Hub, or cannot be read without logging in (hf auth login): {error}"
        ) from error
    except ConnectionError as error:
        raise OSError(
            f"{name} is not in the local cache and the Hub cannot be reached ({error}). Go online once (unset "
            "HF_HUB_OFFLINE), or copy the cache of a machine that has it."
        ) from error
    image_column = _image_column(table, image_column, name)
    labels, classes = None, None
    if labelled:
        labels, classes = _labels(table, _label_column(table, label_column, name), name)
    checksums = table.info.download_checksums or {}
    commit = next((found[1] for key in checksums if (found := _COMMIT.search(key))), revision)
    # Bytes as they are stored: decoding is ours, so that an error can name the row.
    column = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageDataset(
        TableImages(column, image_column, name, _own_folders(builder, options)),
        labels=labels,
        classes=classes,
        name=name,
        split=split,
        revision=commit,
        rows=torch.arange(len(table)),
    )


def _own_folders(builder: str, options: Mapping[str, Any]) -> list[Path]:
    """Where files of the dataset lie: beside the table, or, of the Hub, where its own files are cached."""
    if (named := options.get("data_files")) is not None:
        files = [file for part in named.values() for file in part] if isinstance(named, Mapping) else [str(named)]
        # Of a pattern the part before its first wildcard.
        paths = [Path(re.split(r"[*?\[]", str(file), maxsplit=1)[0]) for file in files]
        return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    own = Path(HF_HUB_CACHE) / f"datasets--{builder.replace('/', '--')}"
    return [own, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]


def _image_column(table: Any, column: str | None, name: str) -> str:
    import datasets

    if column is None:
        found = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
        # Parquet that was not written by `datasets` holds the same record without saying that it is an image.
        found = found or [key for key, feature in table.features.items() if _is_record(feature)]
        if len(found) != 1:
            raise ValueError(
                f"{name} has {len(found) or 'no'} columns of images; pass image_column=, one of {_names(table)}."
            )
        return found[0]
    _check_column(table, column, "image_column", name)
    return column


def _is_record(feature: Any) -> bool:
    return isinstance(feature, Mapping) and {"bytes", "path"} <= set(feature)


def _label_column(table: Any, column: str | None, name: str) -> str:
    import datasets

    if column is None:
        found = [key for key, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(found) != 1:
            found = [key for key in _LABEL_NAMES if key in table.features][:1]
        if not found:
            raise NoLabelsError(
                f"{name} has no label column; it has {_names(table)}: pass label_column=, or {WITHOUT_LABELS}."
            )
        return found[0]
    _check_column(table, column, "label_column", name)
    return column


def _check_column(table: Any, column: str, argument: str, name: str) -> None:
    if column not in table.features:
        tail = f", or {WITHOUT_LABELS}" if argument == "label_column" else ""
        raise ValueError(f"{name} has no column {column!r}; pass {argument}=, one of {_names(table)}{tail}.")


def _names(table: Any) -> str:
    return ", ".join(table.column_names)


def _labels(table: Any, column: str, name: str) -> tuple[torch.Tensor, list[str] | None]:
    """Labels and names of the classes; strings are numbered in alphabetical order."""
    import datasets

    values = table.select_columns([column])[:][column]
    if any(value is None for value in values):
        raise NoLabelsError(f"{name} has rows without a value in {column!r}: filter them, or pass {WITHOUT_LABELS}.")
    if values and isinstance(values[0], str):
        classes = sorted(set(values))
        numbers = {label: number for number, label in enumerate(classes)}
        return torch.tensor([numbers[value] for value in values]), classes
    if values and not isinstance(values[0], int):
        raise ValueError(
            f"The column {column!r} of {name} holds {type(values[0]).__name__}, not a class; pass label_column=, one "
            f"of {_names(table)}."
        )
    feature = table.features[column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return torch.tensor(values, dtype=torch.int64), names
