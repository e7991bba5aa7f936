# SPDX-License-Identifier: Apache-2.0
"""`RemoteFile`: a bank on the Hub, or on any storage that fsspec knows, read through a copy on this disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from .source import FILE_NAME

__all__ = ["RemoteFile", "is_remote"]


@dataclass(frozen=True)
class RemoteFile:
    """A bank that is read through a copy on this disk: "user/name" on the Hub, or the URL of a file (fsspec)."""

    where: str
    revision: str | None = None  # branch, tag or commit on the Hub

    def fetch(self) -> Path:
        """Return the path of a copy of what is there now, another for another content.

        FileNotFoundError if there is none, or none in the cache while offline; OSError if it cannot be fetched.
        """
        if "://" in self.where:
            return self._fetch_url()
        try:
            return Path(hf_hub_download(self.where, FILE_NAME, revision=self.revision))
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise FileNotFoundError(
                f"There is no folder {self.where}, and no {FILE_NAME} in that repository of the Hub: {error} For a "
                f"new bank on this disk name ./{self.where}; for adapters on the Hub give a list of their names."
            ) from error

    def _fetch_url(self) -> Path:
        """Copy the file into a folder of its own in the Hub's home, which processes share, unless it is there."""
        files, path = url_to_fs(self.where)
        files.invalidate_cache()
        try:
            facts = files.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no file {self.where}: name that of a bank, bank.sqlite.") from None
        if facts["type"] != "file":
            raise FileNotFoundError(f"{self.where} is a folder: name the file of a bank in it, bank.sqlite.")
        folder = Path(HF_HOME) / "smn_peft" / _digest(self.where)
        copy = folder / f"{_digest(repr(sorted(facts.items())))}.sqlite"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not copy.exists():
                files.get_file(path, str(part := folder / "part"))
                files.invalidate_cache()
                if files.info(path) != facts:
                    raise OSError(f"{self.where} was replaced while it was fetched: try again.")
                os.replace(part, copy)
                # The last but one may be about to be opened by another process.
                for old in sorted(folder.glob("*.sqlite"), key=os.path.getmtime)[:-2]:
                    old.unlink()
        return copy


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_remote(where: str | os.PathLike[str]) -> bool:
    """Whether it is a URL, or names a repository on the Hub and nothing on this disk."""
    if isinstance(where, str) and "://" in where:
        return True
    if not isinstance(where, str) or where.count("/") != 1 or where.startswith((".", "/", "~")):
        return False
    return not (where.endswith((".sqlite", "/")) or Path(where).exists() or Path(where).parent.exists())
