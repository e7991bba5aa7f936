# SPDX-License-Identifier: Apache-2.0
"""What successive runs of a process share: decoded images, and the frozen base's features of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..data import ImageDataset
from ..evaluation import Features
from .train_arguments import TrainArguments

__all__ = ["base_features", "decoded", "share"]

_HELD: ContextVar[dict[str, tuple[Any, Any]] | None] = ContextVar("what runs share", default=None)


@contextmanager
def share() -> Iterator[None]:
    """While this lasts, [`decoded`] and [`base_features`] keep what they gave last for each purpose."""
    token = _HELD.set({} if (held := _HELD.get()) is None else held)
    try:
        yield
    finally:
        _HELD.reset(token)


def decoded(images: ImageDataset, purpose: str, key: Hashable) -> ImageDataset:
    """``images.cached()``, or what it gave before for the same purpose and key.

    Args:
        images: Images that may still be files.
        purpose: "train", "test": one set is held for each.
        key: All that says which images, and which labels, these are.

    Raises:
        ImageError: An image cannot be read.
    """
    held = _HELD.get()
    if held is None:
        return images.cached()
    if purpose not in held or held[purpose][0] != key:
        held.pop(purpose, None)  # its memory is wanted
        held[purpose] = key, images.cached()
    found: ImageDataset = held[purpose][1]
    return found


def base_features(arguments: TrainArguments, images: ImageDataset, extract: Callable[[], Features]) -> Features:
    """What `extract` gives, or what it gave before for the very same images and a run on the same frozen base.

    Args:
        arguments: They say which base it is, and how features are computed.
        images: What the features are of. Only images that [`decoded`] holds are the same object in the next run.
        extract: Computes the features of the frozen base.
    """
    held, key = _HELD.get(), _base_key(arguments)
    purpose = next((name for name, (_, value) in (held or {}).items() if value is images), None)
    if held is None or purpose is None:
        return extract()
    slot = f"features of {purpose}"
    if slot not in held or held[slot][0] != key or held[slot][1][0] is not images:
        held.pop(slot, None)
        held[slot] = key, (images, extract())
    found: Features = held[slot][1][1]
    return found


def _base_key(arguments: TrainArguments) -> Hashable:
    names = ("backbone", "weights", "pretrained", "backbone_revision", "image_size", "batch_size", "channels_last")
    # A zero-shot run's features are projected; weights that no file gives are drawn from the seed.
    return *(getattr(arguments, name) for name in names), arguments.objective == "zero_shot", arguments.seed
