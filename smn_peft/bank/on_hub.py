# SPDX-License-Identifier: Apache-2.0
"""A bank on the Hub: one file in a repository, pushed as a whole and opened read-only."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from .source import TaskSource
from .store import FILE_NAME, DiskStore

__all__ = ["open_store", "push_source"]


def open_store(where: str | os.PathLike[str], *, read_only: bool = False, revision: str | None = None) -> DiskStore:
    """Open a bank of this disk, or of the Hub: it is fetched if it is not in the cache, and read-only.

    Args:
        where: See [`DiskStore.open`]; or "user/name", where there is no such folder and no folder "user".
        read_only: See [`DiskStore.open`].
        revision: Branch, tag or commit on the Hub.

    Raises:
        AdapterFileError: If the file is damaged.
        FileNotFoundError: If there is no such bank, or none in the cache while offline.
        ValueError: If the file is no bank.
    """
    if not _is_on_hub(where):
        return DiskStore.open(where, read_only=read_only)
    try:
        file = hf_hub_download(str(where), FILE_NAME, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no folder {where}, and no {FILE_NAME} in that repository of the Hub: {error} For a new bank on "
            f"this disk name ./{where}; for adapters on the Hub give a list of their names."
        ) from error
    return DiskStore.open(file, read_only=True, immutable=True)


def _is_on_hub(where: str | os.PathLike[str]) -> bool:
    if not isinstance(where, str) or where.count("/") != 1 or where.startswith((".", "/", "~")):
        return False
    return not (where.endswith((".sqlite", "/")) or Path(where).exists() or Path(where).parent.exists())


def push_source(
    source: TaskSource,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload bank",
    token: str | bool | None = None,
) -> CommitInfo:
    """Push all tasks as one file; the repository and the branch are made where they do not exist.

    Args:
        source: The tasks.
        repo_id: Repository, "user/name".
        private: Make the repository private. An existing public one is refused.
        revision: Branch to commit to.
        commit_message: First line of the commit.
        token: Token, by default from HF_TOKEN or `hf auth login`.

    Raises:
        OSError: If the Hub refuses or cannot be reached, or the disk has no room for a copy.
        ValueError: If the repository is public and must not be.
    """
    api = HfApi(library_name="smn_peft", token=token)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / FILE_NAME
        if isinstance(source, DiskStore):
            source.copy(copy)
        else:
            with DiskStore.open(copy) as store:
                store.add_many((name, source.read(name)) for name in source.names())
        with DiskStore.open(copy, read_only=True, immutable=True) as store:
            local = sorted({info.base for info in store.infos() if info.base and os.path.isabs(info.base)})
        if local:
            warnings.warn(
                f"Tasks name their base by a path of this disk, which whoever opens the bank reads: {local[0]}.",
                stacklevel=3,
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and api.model_info(repo_id).private is False:
            raise ValueError(f"{repo_id} exists and is public: nothing was sent. Choose another name.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_file(
            path_or_fileobj=copy,
            path_in_repo=FILE_NAME,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
        )
