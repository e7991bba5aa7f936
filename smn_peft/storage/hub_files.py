# SPDX-License-Identifier: Apache-2.0
"""An adapter by the name that a user gives: a file, a folder, or a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .adapter_config import CONFIG_NAME
from .adapter_file import WEIGHTS_NAME, check_adapter_file

PICKLE_NAME = "adapter_model.bin"


def locate_adapter(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Find an adapter on the disk, or download its two files into the Hub's cache.

    Args:
        name: A safetensors file, a folder, or ``user/name`` on the Hub.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the adapter inside `name`.

    Raises:
        FileNotFoundError: If there is no such adapter.
        ValueError: If the subfolder leads out of what `name` holds.
    """
    if subfolder and (".." in PurePosixPath(subfolder).parts or os.path.isabs(subfolder)):
        raise ValueError(f"subfolder={subfolder!r} leads out of {name}: name a folder inside it.")
    path = Path(name) / subfolder if subfolder else Path(name)
    if path.exists():
        return path
    if revision is None and (
        path.suffix == ".safetensors" or name.count("/") != 1 or name.startswith((".", "/", "~"))
    ):
        raise FileNotFoundError(f"{path} does not exist, and is no user/name on the Hub.")
    try:
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            path = Path(hf_hub_download(name, file, revision=revision, subfolder=subfolder))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a file, a folder nor an adapter on the Hub: {reason}") from error
    return path.parent


def check_folder_weights(folder: str | os.PathLike[str]) -> None:
    """Check an adapter's file before PEFT reads it; ValueError where there is only a pickle, which PEFT would load."""
    if (Path(folder) / WEIGHTS_NAME).exists():
        check_adapter_file(folder)
    elif (Path(folder) / PICKLE_NAME).exists():
        raise _pickled(str(folder))


def check_hub_weights(repo_id: str, subfolder: str | None = None, **options: Any) -> None:
    """As [`check_folder_weights`], of a repository on the Hub; the file is then in the Hub's cache.

    What cannot be fetched is left for PEFT to fetch and to report. `options` are those of `hf_hub_download`.
    """
    revision, pickle = options.get("revision"), f"{subfolder}/{PICKLE_NAME}" if subfolder else PICKLE_NAME
    try:
        path = hf_hub_download(repo_id, WEIGHTS_NAME, subfolder=subfolder, **options)
    except LocalEntryNotFoundError:  # offline
        found = try_to_load_from_cache(repo_id, pickle, cache_dir=options.get("cache_dir"), revision=revision)
        if isinstance(found, str):
            raise _pickled(repo_id) from None
    except EntryNotFoundError:
        if file_exists(repo_id, pickle, revision=revision, token=options.get("token")):
            raise _pickled(repo_id) from None
    except (HfHubHTTPError, HFValidationError, OSError):
        return
    else:
        check_adapter_file(path)


def _pickled(where: str) -> ValueError:
    return ValueError(
        f"{where} has its masks in a pickle ({PICKLE_NAME}), which can run code, and no {WEIGHTS_NAME}. Ask its "
        "author to save it with save_pretrained, which writes safetensors."
    )
