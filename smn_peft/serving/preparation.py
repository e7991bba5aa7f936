# SPDX-License-Identifier: Apache-2.0
"""`Preparations`: how images are prepared for each task, as its adapter's config says."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..backbones import Backbone
from ..data import check_preprocessing, preprocessing_transform
from .errors import ServingError

__all__ = ["Preparations", "trained_size"]

_PIXELS = 4096**2
_KEY = "preprocessing"


class Preparations:
    """How images are prepared for each task: as it was trained, else as the base says; in one size if one was asked.

    A way to prepare an image is a dictionary as `Backbone.preprocessing`.
    """

    def __init__(self, backbone: Backbone, image_size: int | None = None) -> None:
        """Prepare for a backbone's tasks; `image_size`, if given, is used whatever a task was trained on."""
        self.base = check_preprocessing(backbone.preprocessing)
        self._size = {} if image_size is None else {"image_size": image_size}

    def used(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """How images are prepared for the task of this config.

        Raises:
            ValueError: If the config says it in a way that cannot be followed.
        """
        return {**(check_preprocessing(config[_KEY]) if config.get(_KEY) else self.base), **self._size}

    def difference(self, config: Mapping[str, Any]) -> str | None:
        """What the server does otherwise than the task was trained; None where that is nothing, or not known."""
        if not config.get(_KEY) or not self._size:
            return None
        trained, size = check_preprocessing(config[_KEY])["image_size"], self._size["image_size"]
        return None if trained == size else f"It was trained on {trained} pixels; the server prepares {size}."

    @staticmethod
    def apply(image: Tensor, ways: Iterable[dict[str, Any]]) -> list[Tensor]:
        """An image (3, height, width) uint8 prepared in each way; one tensor for all that are the same.

        Raises:
            ServingError: 422 if together they are too large.
        """
        keys = [json.dumps(way, sort_keys=True) for way in ways]
        if sum(json.loads(key)["image_size"] ** 2 for key in set(keys)) > _PIXELS:
            what = "The tasks want the image in too many sizes."
            raise ServingError(422, what, "Ask fewer tasks at a time.")
        done = {key: _transform(key)(image) for key in set(keys)}
        return [done[key] for key in keys]


@functools.lru_cache(64)
def _transform(key: str) -> Any:
    return preprocessing_transform(json.loads(key))


def trained_size(configs: Iterable[Mapping[str, Any]]) -> int | None:
    """The size of image that the first adapter that says one was trained on."""
    for config in configs:
        try:
            return int(check_preprocessing(config[_KEY])["image_size"])
        except (KeyError, ValueError):
            continue
    return None
