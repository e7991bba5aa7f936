# SPDX-License-Identifier: Apache-2.0
"""What of an adapter's config decides its answers, kept in the weights file too: PEFT may load that file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter_file import SETTINGS_NAME, AdapterFileError
from .formats import check_format_version

__all__ = ["SETTINGS", "is_settings", "read_settings", "settings_tensor"]

SETTINGS = (
    "base_fingerprint",
    "base_model_name_or_path",
    "batch_norm",
    "density",
    "density_schedule",
    "format_version",
    "id2label",
    "init_score",
    "mask_type",
    "preprocessing",
    "rank_by",
    "scale",
    "scale_gradient",
    "seed",
    "select",
    "threshold",
    "trainable_fraction",
    "unmasked_fingerprint",
)
"""Fields of the config. What it targets is not among them: the keys of the file's tensors say that."""


def is_settings(name: str) -> bool:
    """Whether a tensor of an adapter's file holds its settings."""
    return name.rpartition(".")[2] == SETTINGS_NAME


def settings_tensor(config: Mapping[str, Any]) -> Tensor:
    """The settings of a config as (bytes,) uint8: JSON, the same bytes for the same settings."""
    values = json.loads(json.dumps({name: config[name] for name in SETTINGS if name in config}))  # keys are texts now
    text = json.dumps(values, separators=(",", ":"), sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_settings(name: str, tensor: Tensor) -> dict[str, Any]:
    """What [`settings_tensor`] made a tensor of; fields of a later release are left out.

    Args:
        name: Of the tensor, for messages.
        tensor: As the file has it.

    Raises:
        AdapterFileError: If it is no such tensor.
        ValueError: If its format is not known.
    """
    try:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}")
        values = json.loads(tensor.cpu().numpy().tobytes())
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{name} holds no settings of an adapter ({error}): fetch the file again.") from error
    check_format_version(values.get("format_version", 1))
    return {name: values[name] for name in SETTINGS if name in values}
