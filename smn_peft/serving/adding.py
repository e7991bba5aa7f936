# SPDX-License-Identifier: Apache-2.0
"""How adapters come into a bank that serves: from a folder, from the Hub or uploaded; with the names of their classes.

Nothing of an adapter is ever run: it is one JSON and one safetensors file, both checked.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from ..bank.bank import MaskBank
from ..storage import CONFIG_NAME, WEIGHTS_NAME, read_config
from .errors import ServingError
from .labels import CONFIG_KEY, class_names, names_of_run

__all__ = ["adapter_folders", "add_folder", "add_from_hub", "add_uploaded", "adding_refused", "load_folders"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def add_folder(
    bank: MaskBank, name: str, folder: Path, *, classes: Sequence[str] | None = None, replace: bool = False
) -> None:
    """Add an adapter of this machine; its classes are called as given, as its config says, or as its run says.

    Raises:
        AdapterFileError: If it is damaged.
        FileNotFoundError: If there is no adapter.
        ValueError: If the name is taken or not allowed, or the adapter does not belong to the base.
    """
    config = read_config(folder)
    names = classes or (None if class_names(config) else names_of_run(folder))
    if not names:
        bank.add(name, folder, replace=replace)
        return
    config[CONFIG_KEY] = {str(index): label for index, label in enumerate(names)}
    with tempfile.TemporaryDirectory() as staged:
        (Path(staged) / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
        os.symlink((folder / WEIGHTS_NAME).resolve(), Path(staged) / WEIGHTS_NAME)
        bank.add(name, staged, replace=replace)


def add_from_hub(bank: MaskBank, name: str, hub_id: str, revision: str | None, *, replace: bool = False) -> None:
    """Add an adapter of the Hub; raises as [`add_folder`], and OSError if the Hub cannot be reached."""
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is not an id on the Hub: it reads user/name.")
    if os.path.isdir(hub_id):
        raise ValueError(f"{hub_id} is a folder where the server runs: send it as 'folder'.")
    bank.add(name, hub_id, replace=replace, revision=revision)


def add_uploaded(
    bank: MaskBank,
    name: str,
    config: bytes,
    weights: bytes,
    *,
    classes: Sequence[str] | None = None,
    replace: bool = False,
) -> None:
    """Add an adapter whose two files a client sent; raises as [`add_folder`]."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_bytes(config)
        (Path(folder) / WEIGHTS_NAME).write_bytes(weights)
        add_folder(bank, name, Path(folder), classes=classes, replace=replace)


def adding_refused(error: Exception, name: str) -> ServingError | None:
    """What the client is told of an error of adding; None for one that is not its doing."""
    if isinstance(error, HfHubHTTPError):
        return ServingError(502, f"The Hub refused: {error}", "Check the id and the server's access to it.")
    if isinstance(error, FileNotFoundError):
        return ServingError(422, f"There is no adapter: {error}", f"Name a folder with {CONFIG_NAME}.")
    if isinstance(error, PermissionError):
        return ServingError(403, f"Task {name!r} was not changed: {error}", "Give the server access to its files.")
    if isinstance(error, OSError):
        return ServingError(503, f"Task {name!r} was not changed: {error}", "Try again later.", {"Retry-After": "5"})
    if isinstance(error, (ValueError, TypeError)):
        return ServingError(422, f"Task {name!r} was not added: {error}", "Send an adapter made for the base.")
    return None


def adapter_folders(folder: Path) -> list[Path]:
    """The folder itself if it is an adapter, else those in it that are, sorted; none where it is something else."""
    if (folder / CONFIG_NAME).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))


def load_folders(bank: MaskBank, folders: Iterable[Path]) -> dict[str, str]:
    """Add folders, each under its own name; returns why some were left out, by name."""
    refused = {}
    for folder in folders:
        name = folder.resolve().name
        try:
            add_folder(bank, name, folder)
        except (ValueError, TypeError, OSError) as error:
            refused[name] = str(error)
    return refused
