# SPDX-License-Identifier: Apache-2.0
"""`check_crops`: whether SwAV's crops and the backbone go together, before anything is trained."""

from __future__ import annotations

from ..backbones import Backbone, accept_size
from ..data import MultiCropOptions
from .train_arguments import TrainArguments

__all__ = ["check_crops"]


def check_crops(arguments: TrainArguments, backbone: Backbone) -> None:
    """Refuse sizes of crops that do not fit, and let the backbone take the local ones beside its own.

    Raises:
        ValueError: If a global crop is not to have the image size, or a local one is not smaller or not taken.
    """
    crops, size = arguments.multi_crop, backbone.image_size
    if crops.global_size not in (size, MultiCropOptions().global_size):
        raise ValueError(
            f"multi_crop.global_size={crops.global_size} is not the image size, {size}, which global crops have: set "
            f"image_size={crops.global_size}, or leave global_size out."
        )
    if not crops.local_crops:
        return
    if crops.local_size >= size:
        raise ValueError(
            f"multi_crop.local_size={crops.local_size} must be below the size of a global crop, "
            f"which is the image size, {size}: the paper has 96 to 224. Or set multi_crop.local_crops=0."
        )
    try:
        accept_size(backbone, crops.local_size)
    except ValueError as error:
        raise ValueError(f"{error}. Set another multi_crop.local_size, or multi_crop.local_crops=0.") from error
