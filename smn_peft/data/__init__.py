# SPDX-License-Identifier: Apache-2.0
"""Images to train and evaluate on: datasets by name or path, few-label subsets, transforms and batches."""

from __future__ import annotations

from .dataset import ImageDataset, NoLabelsError, NoSplitError, held_out, label_subset
from .decoding import ImageError
from .loading import build_loader
from .registry import dataset_spec, list_datasets
from .sources import load_images, stream_images
from .streaming import ImageStream, build_stream_loader
from .transforms import (
    MultiCropOptions,
    SupervisedOptions,
    check_preprocessing,
    evaluation_transform,
    multi_crop_transform,
    preprocessing_transform,
    supervised_transform,
)

__all__ = [
    "ImageDataset",
    "ImageError",
    "ImageStream",
    "MultiCropOptions",
    "NoLabelsError",
    "NoSplitError",
    "SupervisedOptions",
    "build_loader",
    "build_stream_loader",
    "check_preprocessing",
    "dataset_spec",
    "evaluation_transform",
    "held_out",
    "label_subset",
    "list_datasets",
    "load_images",
    "multi_crop_transform",
    "preprocessing_transform",
    "stream_images",
    "supervised_transform",
]
