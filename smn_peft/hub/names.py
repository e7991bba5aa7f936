# SPDX-License-Identifier: Apache-2.0
"""What a name in a run's records means to others: a repository of the Hub, or a file of somebody's own disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import PurePath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..backbones import is_file_spec
from ..data.registry import DATASETS

__all__ = ["as_code", "as_span", "as_text", "check_repo_id", "check_subfolder", "dataset_id", "hub_id", "shown_name"]

_FILES = (".npz", ".parquet", ".safetensors")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")


def _is_local(name: str) -> bool:
    return (
        os.path.isabs(name)
        or name.startswith((".", "~"))
        or name.endswith(_FILES)
        or is_file_spec(name)
        or os.path.exists(name)
    )


def hub_id(name: str | None) -> str | None:
    """The repository that a name means, such as "timm/resnet50.a1_in1k"; None for what only its owner has.

    Args:
        name: Name of a model or dataset as a run records it; timm's "hf-hub:" in front is taken off.
    """
    if not name or _is_local(name):
        return None
    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if _REPOSITORY.fullmatch(name) else None


def dataset_id(name: str | None) -> str | None:
    """The dataset's repository on the Hub: of a name that `load_images` knows, or the id itself; else None."""
    if name in DATASETS:
        return DATASETS[name].hub_id
    return hub_id(name)


def shown_name(name: str | None) -> str:
    """The name as a card may show it: of a path on somebody's disk its last part only; "" for None."""
    if not name:
        return ""
    return PurePath(name).name if _is_local(name) else name


def as_text(value: object) -> str:
    """A value from a record as Markdown that shows it on one line: nothing in it is a link, an image or HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def as_span(value: object) -> str:
    """A value from a record as a code span of Markdown, which knows no escapes: what could end it is replaced."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("<", "(").replace(">", ")") + "`"


def as_code(value: Any) -> str:
    """A JSON value as a Python literal, which also leaves the block of code that it stands in as it is."""
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text.replace("`", "\\x60").replace("<", "\\x3c")  # both are found in texts only


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub would not take, before anything is read or sent.

    Raises:
        ValueError: With what is wrong and an example.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: {error} Write it as user/smn-cifar100.") from error


def check_subfolder(subfolder: str | None) -> None:
    """Refuse a folder name that leaves the repository or that another system cannot hold.

    Raises:
        ValueError: With what is allowed.
    """
    if subfolder is not None and not _FOLDER.fullmatch(subfolder):
        raise ValueError(
            f"subfolder={subfolder!r}: a task's folder has letters, digits, '-', '_' and '.', parts divided by '/', "
            "each beginning with a letter or digit, as in cifar100 or vit/cifar100."
        )
