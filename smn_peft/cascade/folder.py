# SPDX-License-Identifier: Apache-2.0
"""Tensors and facts of a cascade's folder: safetensors and JSON, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..functional.features import Whitening
from ..storage.adapter_file import map_tensors
from ..storage.files import atomic_write
from ..storage.files import read_json as read_json_file

CASCADE_NAME = "cascade.json"
Shapes = Mapping[str, tuple[str | int, ...]]
WHITENING = ("mean", "components", "singular_values", "samples")
_FORMAT = 1
_DAMAGED = "Copy the folder again, name the base that it was fitted on, or fit the cascade anew."


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Read tensors and check them: `components` are fp32, all others fp64; letters in `shapes` are equal sizes."""
    try:
        found = map_tensors(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: the copy of the cascade is incomplete.") from None
    if set(found) != set(shapes):
        raise ValueError(f"{path} holds {', '.join(sorted(found))}, not {', '.join(sorted(shapes))}. {_DAMAGED}")
    sizes: dict[str | int, int] = {}
    for name, shape in shapes.items():
        tensor, dtype = found[name], torch.float32 if name.endswith("components") else torch.float64
        same = len(tensor.shape) == len(shape) and all(
            real == (size if isinstance(size, int) else sizes.setdefault(size, real))
            for size, real in zip(shape, tensor.shape, strict=True)
        )
        if not same or tensor.dtype != dtype or not tensor.isfinite().all():
            wanted, got = f"{dtype} of the shape {shape}", f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{path}: {name} must be finite numbers in {wanted}; it is {got}. {_DAMAGED}")
    return found


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON file with the number of its format, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps({"format": _FORMAT, **facts}, indent=1) + "\n").encode())


def read_json(path: Path, known: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Read facts and check the type of each by name; what is damaged, or of another format, is refused."""
    try:
        found = read_json_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: {path.parent} holds no finished cascade.") from None
    except ValueError as error:
        raise ValueError(f"{error} {_DAMAGED}") from error
    if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}; smn_peft's newest version reads all. {_DAMAGED}")
    for name, kind in known.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{path}: {name} is missing or of another type. {_DAMAGED}")
    return found


def whitening_shapes(dim: str | int = "F", kept: str = "d", prefix: str = "") -> dict[str, tuple[str | int, ...]]:
    """Shapes of [`whitening_tensors`] of `dim` features to `kept` components."""
    shapes: tuple[tuple[str | int, ...], ...] = (dim,), (kept, dim), (kept,), (1,)
    return {f"{prefix}{name}": shape for name, shape in zip(WHITENING, shapes, strict=True)}


def whitening_tensors(whitening: Whitening, prefix: str = "") -> dict[str, Tensor]:
    """A whitening as tensors by name."""
    samples = torch.tensor([whitening.samples], dtype=torch.float64)
    tensors = {name: getattr(whitening, name) for name in WHITENING} | {"samples": samples}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def read_whitening(tensors: Mapping[str, Tensor], path: Path, prefix: str = "") -> Whitening:
    """The whitening whose tensors have this prefix, refused if it could not have been fitted."""
    mean, components, values, samples = (tensors[f"{prefix}{name}"] for name in WHITENING)
    if not bool((values > 0).all()) or not float(samples) >= 2 or math.modf(float(samples))[0]:
        raise ValueError(f"{path}: singular values must be above 0, and samples a number from 2 on. {_DAMAGED}")
    return Whitening(mean, components, values, int(samples))
