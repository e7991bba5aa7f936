# SPDX-License-Identifier: Apache-2.0
"""An adapter's safetensors file: checked and read, written whole or not at all, and its bytes counted by purpose."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from ..functional.packing import packed_size
from .adapter_config import check_settings, is_settings
from .codec.blob import BLOB_NAME, MaskBlob
from .files import AdapterFileError, atomic_write, open_regular, read_bytes

WEIGHTS_NAME = "adapter_model.safetensors"
BASE_PREFIX = "base_model.model."
"""What PEFT puts before the base model's own names in the keys of an adapter's file."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}
_STANDARDISE = (".feature_mean", ".feature_std")  # of the head of `Classifier`
_MAX_HEADER = 25_000_000  # a ViT-g header has 60 kB
_MAX_DIM = 16
_ADVICE = "The download or copy is incomplete or the file is damaged: fetch it again."


@dataclass(frozen=True)
class AdapterSizes:
    """Bytes of an adapter file by purpose; `total` is the whole file, header and settings included."""

    mask: int
    head: int
    statistics: int
    scores: int
    total: int


def purpose_of(name: str) -> str:
    """Purpose of a tensor of an adapter's file: ``"mask"``, ``"head"``, ``"statistics"`` or ``"scores"``."""
    attribute = name.rpartition(".")[2]
    if not attribute.startswith("smn_"):
        return "head"
    if attribute.endswith(("mask", "masks")):
        return "mask"
    return "scores" if attribute.endswith("scores") else "statistics"


def coded_masks(tensors: Mapping[str, Tensor]) -> tuple[str, MaskBlob] | None:
    """Find coded masks among an adapter's tensors; AdapterFileError if they are damaged, or there more than once.

    Returns:
        What the layers' keys have before their names in the blob, and the blob; None if the masks are bit-packed.
    """
    keys = [key for key in tensors if key.rpartition(".")[2] == BLOB_NAME]
    if not keys:
        return None
    key, tensor = keys[0], tensors[keys[0]]
    if len(keys) > 1:
        raise AdapterFileError(f"The file holds coded masks twice, as {key} and {keys[1]}: fetch it again.")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        found = f"{key} is {tensor.dtype} {tuple(tensor.shape)}"
        raise AdapterFileError(f"{found}, and coded masks are uint8 (bytes,): fetch the file again.")
    return key.removesuffix(BLOB_NAME), MaskBlob.parse(tensor.detach().cpu().contiguous().numpy().data)


def check_packed(name: str, packed: Tensor, numel: int) -> None:
    """Check the packed mask of `numel` weights, under the key `name`, before it touches a model.

    Raises:
        TypeError: If the tensor is not uint8.
        ValueError: If its size is not ⌈numel/8⌉ bytes, or a padding bit is set.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"{name} is {packed.dtype}, a packed mask is uint8: save it again with save_pretrained.")
    if packed.dim() != 1 or packed.numel() != packed_size(numel):
        wanted = f"the base weight has {numel} entries and takes ({packed_size(numel)},) bytes"
        fix = "The adapter was made for another architecture: load the base model that its adapter_config.json names."
        raise ValueError(f"{name} has shape {tuple(packed.shape)}, but {wanted}. {fix}")
    padding = -numel % 8
    if padding and packed.device.type != "meta" and int(packed[-1]) & ((1 << padding) - 1):
        raise ValueError(
            f"{name} has non-zero padding bits after its {numel} bits: the file is damaged. Fetch it again."
        )


def _check_header(where: object, start: bytes, size: int) -> None:
    """Bound the header of a file of `size` bytes by its first 8, before anything parses it."""
    if len(start) < 8:
        raise AdapterFileError(f"{where} is truncated: {size} bytes. {_ADVICE}")
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER or length > size - 8:
        raise AdapterFileError(f"{where} promises a header of {length} bytes but has {size} bytes. {_ADVICE}")


def _tensors(where: object, read: Callable[[Any], dict[str, Tensor]], source: Any) -> dict[str, Tensor]:
    """Tensors of a file or of its bytes, by a reader of safetensors."""
    try:
        tensors = read(source)
        for name, tensor in tensors.items():
            if str(tensor.dtype).startswith(("torch.complex", "torch.float4")) or tensor.dim() > _MAX_DIM:
                raise ValueError(f"{name!r} is {tensor.dtype} of {tensor.dim()} dimensions")
    except (SafetensorError, ValueError, KeyError, OSError) as error:  # KeyError: a dtype that torch does not have
        raise AdapterFileError(f"{where} cannot be read: {error}. {_ADVICE}") from error
    return tensors


def _weights_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / WEIGHTS_NAME if path.is_dir() else path


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, whose bytes are read where they are used; AdapterFileError if it is damaged."""
    with open_regular(path) as file:
        _check_header(path, file.read(8), os.fstat(file.fileno()).st_size)
    return _tensors(path, load_file, path)


def _check_rest(where: object, tensors: Mapping[str, Tensor]) -> str | None:
    """Compare the tensors that are not masks with the file's checksum; returns it, None if there is none."""
    settings = [tensor for name, tensor in tensors.items() if is_settings(name)]
    rest = [tensor for name, tensor in tensors.items() if purpose_of(name) != "mask" and not is_settings(name)]
    return check_settings(where, settings[0], rest) if settings else None


def check_adapter_file(path: str | os.PathLike[str]) -> str | None:
    """Check header, size, and the checksum of head and statistics, which is returned; None if there is none.

    Masks are not read: a coded file has their checksum where they are decoded. `path` is the file, or its folder.

    Raises:
        AdapterFileError: If the file is truncated, its header does not fit it, or the checksum differs.
        FileNotFoundError: If there is no such file.
    """
    path = _weights_path(path)
    return _check_rest(path, map_tensors(path))


def read_adapter_file(path: str | os.PathLike[str], *, settings: bool = False) -> dict[str, Tensor]:
    """Read a file, or the one in a folder: CPU tensors by checkpoint key, checked as by [`check_adapter_file`].

    The result does not change with the file. `settings` adds the adapter's settings, which the config repeats.
    """
    path = _weights_path(path)
    return parse_adapter_file(read_bytes(path), path, settings=settings)


def parse_adapter_file(data: bytes, where: str | os.PathLike[str], *, settings: bool = False) -> dict[str, Tensor]:
    """Parse the bytes of an adapter file; `where` names it in errors, the rest is as of [`read_adapter_file`]."""
    _check_header(where, data[:8], len(data))
    tensors = _tensors(where, load, data)
    _check_rest(where, tensors)
    return {name: tensors[name] for name in sorted(tensors) if settings or not is_settings(name)}


def adapter_sizes(path: str | os.PathLike[str]) -> AdapterSizes:
    """Count the bytes of an adapter file, or of the file in a folder, by purpose."""
    path = _weights_path(path)
    sums = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
    for name, tensor in map_tensors(path).items():
        if not is_settings(name):
            sums[purpose_of(name)] += tensor.nbytes
    return AdapterSizes(**sums, total=path.stat().st_size)


def narrowed(name: str, tensor: Tensor, save_dtype: str) -> Tensor:
    """Round a tensor to how a file holds it with a `save_dtype`; what is no wider, or no float, is returned as it is.

    With ``"int8"`` a matrix (rows, columns) becomes int8 (rows, columns + 2): numbers from −127 to 127, and in the
    last two bytes of each row the bfloat16 that they count in; the mean or standard deviation by which a head
    standardises its input becomes (1,) if all values are the same. All else is bfloat16.

    Args:
        name: Key of the tensor, for errors.
        tensor: What to save.
        save_dtype: As of `MaskConfig`.

    Raises:
        ValueError: A value is NaN, or beyond what the dtype can hold (float16 ends at 65504).
    """
    if save_dtype == "float32" or not tensor.is_floating_point():
        return tensor
    dtype, tensor = _DTYPES[save_dtype], tensor.detach()
    if save_dtype == "int8" and tensor.dim() == 2:
        values = tensor.float()
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity, which int8 cannot: save it with save_dtype='float32'.")
        step = (values.abs().amax(1, keepdim=True) / 127).to(dtype)
        step = torch.where(step == 0, torch.ones_like(step), step)
        numbers = (values / step.float()).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([numbers, step.view(torch.int8)], 1)
    narrow = tensor if tensor.element_size() <= dtype.itemsize else tensor.to(dtype)
    if bool((torch.isinf(narrow) & torch.isfinite(tensor)).any()):
        beyond = f"values beyond what {save_dtype} can hold ({float(tensor.abs().max()):.3g})"
        raise ValueError(f"{name} holds {beyond}: save it with save_dtype='bfloat16' or 'float32'.")
    if save_dtype == "int8" and name.endswith(_STANDARDISE) and bool((narrow == narrow[0]).all()):
        return narrow[:1].clone()
    return narrow


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a file's tensors by key, those of a head in int8 as float32; the inverse of [`narrowed`]."""
    result = dict(tensors)
    for key, narrow in tensors.items():
        if narrow.dtype != torch.int8 or narrow.dim() != 2 or narrow.shape[1] <= 2:
            continue
        result[key] = narrow[:, :-2].float() * narrow[:, -2:].contiguous().view(torch.bfloat16).float()
        for other in (key.removesuffix(".weight") + end for end in _STANDARDISE):
            if other in tensors and tensors[other].shape == (1,):
                result[other] = tensors[other].expand(narrow.shape[1] - 2)
    return result


def write_adapter_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's tensors, whole or not at all, in the bytes that PEFT writes."""
    with atomic_write(path) as file:
        file.write(save(dict(tensors), metadata={"format": "pt"}))
