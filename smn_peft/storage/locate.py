# SPDX-License-Identifier: Apache-2.0
"""An adapter by the name that a user gives: a file, a folder, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .adapter_file import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["locate_adapter"]


def locate_adapter(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Where an adapter lies on the disk; one on the Hub is downloaded into the Hub's cache.

    Only the two files of an adapter are fetched, whatever else the repository holds.

    Args:
        name: A safetensors file, a folder, or ``user/name`` on the Hub.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the adapter inside `name`.

    Raises:
        FileNotFoundError: If there is no such adapter.
    """
    path = Path(name) / subfolder if subfolder else Path(name)
    if path.exists():
        return path
    if revision is None and (path.suffix or name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{path} does not exist, and is no user/name on the Hub.")
    try:
        files = [
            hf_hub_download(name, file, revision=revision, subfolder=subfolder) for file in (CONFIG_NAME, WEIGHTS_NAME)
        ]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a file, a folder nor an adapter on the Hub: {reason}") from error
    return Path(files[0]).parent
