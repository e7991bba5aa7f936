# SPDX-License-Identifier: Apache-2.0
"""How adapters come into a bank that serves: from a folder, from the Hub or uploaded; with the names of their classes.

Nothing of an adapter is ever run: it is one JSON and one safetensors file, both checked.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from ..bank.bank import MaskBank
from ..storage import CONFIG_NAME, WEIGHTS_NAME, read_config
from .errors import ServingError, explained
from .labels import CONFIG_KEY, names_of_run
from .requests import Adding

__all__ = ["adapter_folders", "add_folder", "add_task", "adding_refused", "load_folders"]

# Of the operating system on a path that cannot be one.
_NO_PATH = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL})
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
    names = classes or (None if config.get(CONFIG_KEY) else names_of_run(folder))
    if not names:
        bank.add(name, folder, replace=replace)
        return
    config[CONFIG_KEY] = {str(index): label for index, label in enumerate(names)}
    with tempfile.TemporaryDirectory() as staged:
        (Path(staged) / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
        os.symlink((folder / WEIGHTS_NAME).resolve(), Path(staged) / WEIGHTS_NAME)
        bank.add(name, staged, replace=replace)


def add_task(bank: MaskBank, adding: Adding) -> dict[str, Any]:
    """Add what a client asks for; returns its name, whether it replaced a task, and how many there are.

    Raises:
        ServingError: 409 if the name is taken; see [`adding_refused`] for others.
    """
    name, replaced = adding.name, adding.name in bank
    if replaced and not adding.replace:
        raise ServingError(409, f"There is a task {name!r} already.", "Send replace=true, or another name.")
    try:
        if adding.config is not None and adding.weights is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / CONFIG_NAME).write_bytes(adding.config)
                (Path(folder) / WEIGHTS_NAME).write_bytes(adding.weights)
                add_folder(bank, name, Path(folder), classes=adding.classes, replace=adding.replace)
        elif adding.hub_id is not None:
            _check_hub_id(adding.hub_id)
            bank.add(name, adding.hub_id, replace=adding.replace, revision=adding.revision)
        else:
            add_folder(bank, name, Path(adding.folder or ""), classes=adding.classes, replace=adding.replace)
    except Exception as error:
        raise adding_refused(error, name) or explained(error) from error
    return {"name": name, "replaced": replaced, "total": len(bank)}


def _check_hub_id(hub_id: str) -> None:
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is not an id on the Hub: it reads user/name.")
    if os.path.isdir(hub_id):
        raise ValueError(f"{hub_id} is a folder where the server runs: send it as 'folder'.")


def adding_refused(error: Exception, name: str) -> ServingError | None:
    """What the client is told of an error of adding; None for one that is not its doing."""
    if isinstance(error, HfHubHTTPError):
        return ServingError(502, f"The Hub refused: {error}", "Check the id and the server's access to it.")
    if isinstance(error, FileNotFoundError):
        return ServingError(422, f"There is no adapter: {error}", f"Name a folder with {CONFIG_NAME}.")
    if isinstance(error, PermissionError):
        return ServingError(403, f"Task {name!r} was not changed: {error}", "Give the server access to its files.")
    if isinstance(error, OSError) and error.errno not in _NO_PATH:
        return ServingError(503, f"Task {name!r} was not changed: {error}", "Try again later.", {"Retry-After": "5"})
    if isinstance(error, (ValueError, TypeError, OSError)):
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
