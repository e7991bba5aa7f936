# SPDX-License-Identifier: Apache-2.0
"""Decoded images that successive runs of a process share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..data import ImageDataset

__all__ = ["decoded", "share_decoded"]

_HELD: ContextVar[dict[str, tuple[Hashable, ImageDataset]] | None] = ContextVar("decoded images", default=None)


@contextmanager
def share_decoded() -> Iterator[None]:
    """While this lasts, [`decoded`] keeps what it gave last for each purpose."""
    token = _HELD.set({})
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
    return held[purpose][1]
