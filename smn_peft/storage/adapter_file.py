# SPDX-License-Identifier: Apache-2.0
"""An adapter's safetensors file: checked and read, written whole or not at all, and its bytes counted by purpose."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ..functional.packing import packed_size
from .adapter_config import FORMAT_VERSION, is_settings
from .codec import BLOB_NAME, MaskBlob
from .files import AdapterFileError, atomic_write, open_regular, read_bytes

__all__ = [
    "BASE_PREFIX",
    "REST_CHECKSUM",
    "SAVE_DTYPES",
    "WEIGHTS_NAME",
    "AdapterSizes",
    "adapter_sizes",
    "check_adapter_file",
    "check_packed",
    "coded_masks",
    "finish_adapter_file",
    "parse_adapter_file",
    "purpose_of",
    "read_adapter_file",
    "read_metadata",
    "rounded",
    "write_adapter_file",
]

WEIGHTS_NAME = "adapter_model.safetensors"
BASE_PREFIX = "base_model.model."
"""What PEFT puts before the base model's own names in the keys of an adapter's file."""
REST_CHECKSUM = "smn_rest_checksum"
"""Metadata key of the checksum of all tensors that are not masks; coded masks have one of their own."""
SAVE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of a saved head and statistics by config name; float32 leaves every tensor as it is."""
_MAX_HEADER = 25_000_000  # a ViT-g header has 60 kB
_MAX_DIM = 16
_DTYPES = frozenset("BOOL U8 I8 F8_E4M3 F8_E5M2 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64".split())
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
    """Find the coded masks among an adapter's tensors.

    Returns:
        What the layers' keys have before their names in the blob, and the blob; None if the masks are bit-packed.

    Raises:
        AdapterFileError: If the blob is damaged, or there is more than one.
    """
    keys = [key for key in tensors if key.rpartition(".")[2] == BLOB_NAME]
    if not keys:
        return None
    key, tensor = keys[0], tensors[keys[0]]
    if len(keys) > 1:
        raise AdapterFileError(f"The file holds coded masks twice, as {key} and {keys[1]}: fetch it again.")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise AdapterFileError(
            f"{key} is {tensor.dtype} {tuple(tensor.shape)}, coded masks are uint8 (bytes,): the file is damaged. "
            "Fetch it again."
        )
    return key.removesuffix(BLOB_NAME), MaskBlob.parse(tensor.detach().cpu().contiguous().numpy().data)


def check_packed(name: str, packed: Tensor, numel: int) -> None:
    """Check the packed mask of `numel` weights, under the key `name`, before it touches a model.

    Raises:
        TypeError: If the tensor is not uint8.
        ValueError: If its size is not ⌈numel/8⌉ bytes, or a padding bit is set.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(
            f"{name} is {packed.dtype}, a packed mask is uint8. The file is damaged or is not a mask adapter: save it "
            "again with save_pretrained."
        )
    if packed.dim() != 1 or packed.numel() != packed_size(numel):
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}, but the base weight has {numel} entries and takes "
            f"({packed_size(numel)},) bytes. The adapter was made for another architecture: load the base model that "
            "its adapter_config.json names."
        )
    padding = -numel % 8
    if padding and packed.device.type != "meta" and int(packed[-1]) & ((1 << padding) - 1):
        raise ValueError(
            f"{name} has non-zero padding bits after its {numel} bits: the file is damaged. Download or save it again."
        )


def _weights_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / WEIGHTS_NAME if path.is_dir() else path


def _header_size(where: object, start: bytes, size: int) -> int:
    """Bytes of a file's header, bounded before anything parses it."""
    if len(start) < 8:
        raise AdapterFileError(f"{where} is truncated: {size} bytes. {_ADVICE}")
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER or length > size - 8:
        raise AdapterFileError(f"{where} promises a header of {length} bytes but has {size} bytes. {_ADVICE}")
    return length


def _unreadable(where: object, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{where} cannot be read: {error}. {_ADVICE}")


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries by tensor name, which safetensors found to fit the file; metadata; bytes of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = file.read(_header_size(path, file.read(8), size))
    try:
        with safe_open(path, "pt"):
            header = json.loads(text)
    except (SafetensorError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES or len(entry["shape"]) > _MAX_DIM:
            raise _unreadable(path, ValueError(f"{name!r} is {entry['dtype']} of {len(entry['shape'])} dimensions"))
    return header, metadata, size


def _check_rest(where: object, metadata: Mapping[str, str], rest: Iterable[tuple[str, Tensor]]) -> None:
    """Compare the tensors that are not masks, by name, with the file's checksum if it has one."""
    expected = metadata.get(REST_CHECKSUM)
    if expected is not None and (found := _rest_checksum(rest)) != expected:
        raise AdapterFileError(
            f"{where}: head and statistics have the checksum {found}, the file says {expected}: it is damaged. "
            "Fetch it again."
        )


def _rest_checksum(rest: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32 of the names and bytes of tensors that come sorted by name."""
    checksum = 0
    for name, tensor in rest:
        checksum = zlib.crc32(name.encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"crc32:{checksum:08x}"


def check_adapter_file(path: str | os.PathLike[str]) -> None:
    """Check a file's header and size, and head and statistics against their checksum if it has one.

    Masks are not read: a coded file has their checksum where they are decoded.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the file is truncated, its header is unreadable or does not fit it, or the checksum
            differs.
        FileNotFoundError: If there is no such file.
    """
    path = _weights_path(path)
    header, metadata, _ = _read_header(path)
    if REST_CHECKSUM in metadata:
        with safe_open(path, "pt") as file:
            names = sorted(name for name in header if purpose_of(name) != "mask")
            _check_rest(path, metadata, ((name, file.get_tensor(name)) for name in names))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the ``__metadata__`` of a file's header, without its tensors; errors as of [`check_adapter_file`]."""
    return _read_header(_weights_path(path))[1]


def read_adapter_file(path: str | os.PathLike[str], *, settings: bool = False) -> dict[str, Tensor]:
    """Read and check a whole adapter file; the result does not change with the file.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.
        settings: Return the tensor of the adapter's settings too, which the config repeats.

    Returns:
        Tensors by checkpoint key, on the CPU.

    Raises:
        AdapterFileError: As [`check_adapter_file`].
    """
    path = _weights_path(path)
    return parse_adapter_file(read_bytes(path), path, settings=settings)


def parse_adapter_file(data: bytes, where: str | os.PathLike[str], *, settings: bool = False) -> dict[str, Tensor]:
    """Parse the bytes of an adapter file; `where` names it in errors, the rest is as of [`read_adapter_file`]."""
    length = _header_size(where, data[:8], len(data))
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise _unreadable(where, error) from error
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.dim() > _MAX_DIM:
            raise _unreadable(where, ValueError(f"{name!r} is {tensor.dtype} of {tensor.dim()} dimensions"))
    names = sorted(tensors)
    _check_rest(where, metadata, ((name, tensors[name]) for name in names if purpose_of(name) != "mask"))
    return {name: tensors[name] for name in names if settings or not is_settings(name)}


def adapter_sizes(path: str | os.PathLike[str]) -> AdapterSizes:
    """Count the bytes of an adapter file, or of the file in a folder, by purpose."""
    header, _, total = _read_header(_weights_path(path))
    sums = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if not is_settings(name):
            sums[purpose_of(name)] += last - first
    return AdapterSizes(**sums, total=total)


def rounded(name: str, tensor: Tensor, save_dtype: str) -> Tensor:
    """Round a tensor, under the key `name`, to the dtype that it is saved in, one of [`SAVE_DTYPES`].

    One that is not a float, or not wider than that dtype, is returned as it is.

    Raises:
        ValueError: If a finite value becomes infinite: fp16 ends at 65504.
    """
    dtype = SAVE_DTYPES[save_dtype]
    if save_dtype == "float32" or not tensor.is_floating_point() or tensor.element_size() <= dtype.itemsize:
        return tensor
    narrow = tensor.detach().to(dtype)
    if bool((torch.isinf(narrow) & torch.isfinite(tensor)).any()):
        raise ValueError(
            f"{name} holds values beyond what {save_dtype} can hold ({float(tensor.abs().max()):.3g}): save it with "
            "save_dtype='bfloat16' or 'float32'."
        )
    return narrow


def finish_adapter_file(
    path: str | os.PathLike[str], *, codec: str, save_dtype: str, base_fingerprint: str | None
) -> None:
    """Round head and statistics of a file that PEFT wrote, and give a coded file its metadata, whole or not at all.

    Bit-packed files in float32 are left as they are, byte for byte, and so is a file that does not exist.

    Raises:
        ValueError: If a value is beyond what `save_dtype` can hold.
    """
    if (codec == "bits" and save_dtype == "float32") or not Path(path).is_file():
        return
    tensors, changed = read_adapter_file(path, settings=True), 0
    for name, tensor in tensors.items():
        if purpose_of(name) in ("head", "statistics"):
            tensors[name] = rounded(name, tensor, save_dtype)
            changed += int((tensors[name].to(tensor.dtype) != tensor).sum())
    if changed:
        warnings.warn(
            f"{changed} values of head and statistics were rounded to {save_dtype} on saving: the file is not what "
            "was evaluated. Call smn_peft.round_extras(model) before the evaluation.",
            stacklevel=2,
        )
    write_adapter_file(path, tensors, base_fingerprint)


def write_adapter_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], base_fingerprint: str | None
) -> None:
    """Write an adapter's tensors, whole or not at all; a coded file says in its metadata what it holds."""
    data = save(dict(tensors), metadata=_metadata(tensors, base_fingerprint))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # safetensors writes the metadata in a random order: sorted, the same adapter has the same bytes
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _metadata(tensors: Mapping[str, Tensor], base_fingerprint: str | None) -> dict[str, str]:
    """Codec, counts, checksums and fingerprint of a coded file, for whoever reads only its header."""
    metadata = {"format": "pt"}
    if (coded := coded_masks(tensors)) is None:
        return metadata
    blob = coded[1]
    inactive = sum(entry.inactive for entry in blob.entries)
    metadata |= {
        "smn_format": str(FORMAT_VERSION),
        "smn_codec": blob.codec,
        "smn_bit_order": "big",
        "smn_active": f"{8 * blob.size - inactive}/{8 * blob.size}",
        "smn_checksum": f"crc32:{blob.checksum:08x}",
    }
    if base_fingerprint is not None:
        metadata["smn_base"] = base_fingerprint
    if rest := [(name, tensors[name]) for name in sorted(tensors) if purpose_of(name) != "mask"]:
        metadata[REST_CHECKSUM] = _rest_checksum(rest)
    return metadata
