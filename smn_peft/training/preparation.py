# SPDX-License-Identifier: Apache-2.0
"""How images were prepared for a saved run, so that whoever uses it prepares them in the same way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..backbones import Backbone
from ..data import check_preprocessing
from ..storage import CONFIG_NAME

__all__ = ["loaded_at", "prepared", "saved_preprocessing"]


def saved_preprocessing(folder: Path, run: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What the adapter's config says, else what ``run.json`` does; None where neither does, as before both did.

    Args:
        folder: Of the adapter.
        run: Arguments and facts of its ``run.json``.

    Raises:
        ValueError: If a value is unusable, naming the file.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found = config.get("preprocessing") or (run or {}).get("preprocessing")
    if found is None:
        return None
    try:
        return check_preprocessing(found)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def loaded_at(load: Callable[[int | None], Backbone], size: int | None) -> Backbone:
    """A base at `size`, by asking for it only where that is not its own: most models take no argument for it."""
    loaded = load(None)
    return loaded if size in (None, loaded.image_size) else load(size)


def prepared(loaded: Backbone, saved: Mapping[str, Any] | None, image_size: int | None, folder: Path) -> Backbone:
    """The base for images prepared as in training, or of another size, which is said.

    Args:
        loaded: The base, at the size that counts.
        saved: Of [`saved_preprocessing`].
        image_size: Pixels of a side that the caller asks for; None: as in training.
        folder: Of the adapter, for the message.
    """
    if saved is not None:
        loaded = loaded.prepared_as(saved)
        if image_size not in (None, saved["image_size"]):
            warnings.warn(
                f"{folder} was trained on images of {saved['image_size']} pixels, and is used on {image_size}, as "
                "image_size says: leave it out for what it was trained for.",
                stacklevel=3,
            )
    return loaded if image_size is None else loaded.prepared_as({"image_size": image_size})
