# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json, checked field by field, and the settings that an adapter's weights file repeats from it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .files import MAX_JSON, AdapterFileError, read_json

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1
"""Version of the adapter format that this release writes; it reads every version up to this one."""
SETTINGS_NAME = "smn_settings"
"""Last part of the key of the tensor that holds an adapter's settings, see [`settings_tensor`]."""
SETTINGS = (
    "base_fingerprint base_model_name_or_path batch_norm density density_schedule format_version id2label init_score "
    "mask_type preprocessing rank_by scale scale_gradient seed select threshold trainable_fraction "
    "unmasked_fingerprint"
).split()
"""Fields of the config that decide an adapter's outputs. The keys of the file's tensors say what it targets."""

_DEFLATED = b"\x01"  # first byte of deflated settings; JSON begins with a brace
# Part of the format. What is likely stands last, where a reference to it is short.
_USUAL = b"""ConvNextForImageClassification","resnet","openai/clip-vit-","timm/vit_base_patch16_224.augreg",\
"timm/resnet50.","id2label":{"0":"","1":"","2":"","3":"","4":"","5":"","6":"","7":"","8":"","9":""},"mean":[0.5,0.5,0.5],\
"std":[0.5,0.5,0.5]}{"base_fingerprint":"float32:","base_model_name_or_path":null,"batch_norm":"adapt",\
"batch_norm":"frozen","checksum":"crc32: of 2","density":null,"density_schedule":null,"format_version":1,\
"id2label":null,"init_score":1.0,"mask_type":"threshold","preprocessing":{"crop_pct":0.875,"image_size":224,\
"interpolation":"bicubic","mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225]},"rank_by":"score","scale":true,\
"scale_gradient":true,"seed":0,"select":"random","threshold":0.0,"trainable_fraction":1.0,\
"unmasked_fingerprint":"float32:"""
_TEXT = (str, NoneType)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("base_fingerprint", "base_model_name_or_path", "revision"),
        (lambda value: isinstance(value, _TEXT), "text or null"),
    ),
    **dict.fromkeys(("check_base", "scale"), (lambda value: isinstance(value, bool), "true or false")),
    "auto_mapping": (
        lambda value: value is None or (isinstance(value, dict) and all(isinstance(v, _TEXT) for v in value.values())),
        "an object of texts",
    ),
    "codec": (lambda value: isinstance(value, str), "text"),
    "seed": (lambda value: type(value) is int, "an integer"),
    "select": (lambda value: value in ("random", "magnitude"), '"random" or "magnitude"'),
    "trainable_fraction": (
        lambda value: type(value) in (int, float) and 0 < value <= 1,
        "a number above 0, and 1 at most",
    ),
}
"""PEFT checks no types: what this package reads of a config, and what it must be."""


def check_format_version(version: object) -> None:
    """ValueError for anything but an integer from 1 to [`FORMAT_VERSION`]."""
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version must be a positive integer, got {version!r}: {CONFIG_NAME} is damaged.")
    if version > FORMAT_VERSION:
        known = f"this smn_peft reads up to {FORMAT_VERSION}. Upgrade it: pip install -U smn_peft."
        raise ValueError(f"This adapter has format version {version}; {known}")


def check_config(config: Any, where: object = CONFIG_NAME) -> dict[str, Any]:
    """Check an adapter's config as JSON gave it; fields may be missing, and `where` names it in errors.

    Raises:
        AdapterFileError: If it is no object, a field is of another kind, or a text cannot be encoded.
        ValueError: If its format is not known.
    """
    if not isinstance(config, Mapping):
        raise AdapterFileError(f"{where} is damaged: it is no JSON object. Fetch it again.")
    for name, (is_valid, kind) in _FIELDS.items():
        if name in config and not is_valid(config[name]):
            found = repr(config[name])[:80]
            raise AdapterFileError(f"{where} is damaged: {name} is {found}, and must be {kind}. Fetch it again.")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except ValueError as error:  # half of a surrogate pair
        raise AdapterFileError(f"{where} holds a text that is none ({error}): fetch it again.") from error
    check_format_version(config.get("format_version", 1))
    return dict(config)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the config in an adapter's folder; FileNotFoundError if there is none."""
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the output folder of smn train, or one with an adapter.")
    try:
        config = read_json(path)
    except ValueError as error:
        raise AdapterFileError(str(error)) from error
    return check_config(config, path)


def is_settings(name: str) -> bool:
    """Whether a tensor of an adapter's file holds its settings."""
    return name.rpartition(".")[2] == SETTINGS_NAME


def settings_tensor(config: Mapping[str, Any], rest: Collection[Tensor]) -> Tensor:
    """Encode the settings of a config as (bytes,) uint8 for the weights file, which PEFT may load without the config.

    The bytes are JSON, the same for the same settings, with a checksum of them and of `rest`: the file's other tensors
    but masks, which have one of their own where they are coded. Beside coded masks they are deflated with [`_USUAL`]
    as dictionary, after a byte that says so.
    """
    values = json.loads(json.dumps({name: config[name] for name in SETTINGS if name in config}))  # keys are texts now
    values["checksum"] = _checksum(values, rest)
    return _encoded(values, config.get("codec"))


def recoded_settings(tensor: Tensor, codec: str) -> Tensor:
    """Encode settings as they stand beside masks of another codec."""
    return _encoded(_from_json(SETTINGS_NAME, tensor), codec)


def _encoded(values: Mapping[str, Any], codec: str | None) -> Tensor:
    data = _to_json(values)
    if codec == "entropy":
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_USUAL)
        data = _DEFLATED + coder.compress(data) + coder.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def check_settings(where: object, tensor: Tensor, rest: Collection[Tensor]) -> str | None:
    """Compare settings and `rest` with the checksum that [`settings_tensor`] wrote; returns it, None if there is none.

    Nothing is compared where PEFT has added tensors after it was computed, as it does with embeddings.
    """
    values = _from_json(where, tensor)
    expected = values.pop("checksum", None)
    if not isinstance(expected, str) or not expected.endswith(f" of {len(rest)}"):
        return None
    if (found := _checksum(values, rest)) != expected:
        what = f"settings, head and statistics have the checksum {found}, the file says {expected}"
        raise AdapterFileError(f"{where}: {what}: it is damaged. Fetch it again.")
    return expected


def _to_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), sort_keys=True).encode()


def _checksum(values: Mapping[str, Any], rest: Collection[Tensor]) -> str:
    """CRC-32 of settings and tensors, and the number of these; names do not count, which loaders may change."""
    checksum = zlib.crc32(_to_json(values))
    for part in sorted(map(_crc32, rest)):
        checksum = zlib.crc32(part.to_bytes(4, "little"), checksum)
    return f"crc32:{checksum:08x} of {len(rest)}"


def _crc32(tensor: Tensor) -> int:
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start


def read_settings(name: str, tensor: Tensor) -> dict[str, Any]:
    """Decode what [`settings_tensor`] made; `name` is its key, and fields of a later release are left out."""
    values = _from_json(name, tensor)
    check_format_version(values.get("format_version", 1))
    return {name: values[name] for name in SETTINGS if name in values}


def _from_json(where: object, tensor: Tensor) -> dict[str, Any]:
    try:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.cpu().numpy().tobytes()
        if data.startswith(_DEFLATED):
            coder = zlib.decompressobj(-15, zdict=_USUAL)
            data = coder.decompress(data[1:], MAX_JSON)
            if not coder.eof:
                raise ValueError(f"they are cut, or more than {MAX_JSON} bytes")
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError, zlib.error) as error:
        raise AdapterFileError(f"{where} holds no settings of an adapter ({error}): fetch the file again.") from error
    return values
