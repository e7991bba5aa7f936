# SPDX-License-Identifier: Apache-2.0
"""What both libraries' loaders return beside the model, and the check that nothing was left random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["ImageSettings", "check_loading"]


@dataclass(frozen=True)
class ImageSettings:
    """How images become input: the library's own transform of an RGB image, and its numbers."""

    transform: Callable[[Any], Tensor]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_loading(info: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint that leaves weights of the model random.

    Raises:
        ValueError: Keys are missing or differ in shape; the first ones are named.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("of another shape", mismatched))
            if keys
        ]
        unexpected = sorted(info["unexpected_keys"])[:3]
        raise ValueError(
            f"The weights of {source} do not fit its config: {'; '.join(parts)}"
            + (f"; not used: {', '.join(unexpected)}" if unexpected else "")
        )
