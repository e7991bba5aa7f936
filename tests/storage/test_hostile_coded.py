# SPDX-License-Identifier: Apache-2.0
"""Every truncation and every flipped bit of a small coded file: an error, or exactly the masks that were saved."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smn_peft.storage.adapter_config import SETTINGS_NAME, settings_tensor
from smn_peft.storage.adapter_file import check_adapter_file, parse_adapter_file, read_adapter_file, write_adapter_file
from smn_peft.storage.codec.blob import BLOB_NAME, MaskBlob, decode_masks, encode_masks
from smn_peft.storage.files import AdapterFileError
from smn_peft.storage.inspection import inspect_adapter, verify_adapter_file
from smn_peft.storage.repack import unpack_tensors

LIMIT = 1 << 16
HEAD = "base_model.model.head.weight"


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shares = {"0.smn_mask": (0.97, 640), "1.smn_mask": (0.5, 120), "2.smn_mask": (1.0, 64)}
    return {name: np.packbits(rng.random(count) < share) for name, (share, count) in shares.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("coded") / "adapter.safetensors"
    head = torch.arange(3.0)
    settings = {f"base_model.model.{SETTINGS_NAME}": settings_tensor({}, [head])}
    write_adapter_file(path, {f"base_model.model.{BLOB_NAME}": blob(), HEAD: head, **settings})
    return path.read_bytes()


def read(data: bytes) -> dict[str, torch.Tensor] | None:
    """What a reader gets, or None where it is refused."""
    try:
        return unpack_tensors(parse_adapter_file(data, "it"), LIMIT)
    except ValueError:  # an AdapterFileError, or a code that takes the base
        return None


def read_path(path: Path, data: bytes) -> dict[str, torch.Tensor] | None:
    """The same from a file, which is checked before."""
    path.write_bytes(data)
    try:
        check_adapter_file(path)
        return unpack_tensors(read_adapter_file(path), LIMIT)
    except ValueError:
        return None


def wrong(found: dict[str, torch.Tensor] | None) -> list[str]:
    """Masks under a right name with wrong bits, or a wrong head; what has another name fits no model."""
    if found is None:
        return []
    expected = {f"base_model.model.{name}": torch.from_numpy(mask) for name, mask in masks().items()}
    expected[HEAD] = torch.arange(3.0)
    return [name for name in found if name in expected and not torch.equal(found[name], expected[name])]


def test_the_whole_file_is_read(data, tmp_path):
    for found in (read(data), read_path(tmp_path / "adapter.safetensors", data)):
        assert found is not None
        assert len(found) == 4
        assert not wrong(found)


def test_every_truncation_is_refused(data, tmp_path):
    for length in range(len(data)):
        assert read(data[:length]) is None, length
        assert length % 9 or read_path(tmp_path / "adapter.safetensors", data[:length]) is None, length


def test_no_flipped_bit_gives_a_wrong_mask_or_head(data, tmp_path):
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    refused = {name: 0 for name in (HEAD, f"base_model.model.{BLOB_NAME}")}
    ranges = {name: [start + offset for offset in header[name]["data_offsets"]] for name in refused}
    for place in range(8 * len(data)):
        bent = bytearray(data)
        bent[place >> 3] ^= 1 << (place & 7)
        found = read(bytes(bent))
        assert not wrong(found), place
        assert place % 41 or not wrong(read_path(tmp_path / "adapter.safetensors", bytes(bent))), place
        for name, (first, last) in ranges.items():
            refused[name] += found is None and first <= place >> 3 < last
    for name, (first, last) in ranges.items():  # the rest are bits that pad a stream
        assert refused[name] > 8 * (last - first) * 0.95
    assert len(data) < 1200


def test_random_overwrites_cost_no_memory(data, tmp_path):
    """Headers and tables that promise gigabytes are refused before anything of that size is made."""
    rng = np.random.default_rng(0)
    start = 8 + int.from_bytes(data[:8], "little")
    tracemalloc.start()
    for _ in range(150):
        bent = np.frombuffer(data, np.uint8).copy()
        first = int(rng.integers(start, len(data) - 1))
        bent[first : first + int(rng.integers(1, 9))] = rng.choice([0, 1, 127, 128, 255])
        assert not wrong(read_path(tmp_path / "adapter.safetensors", bent.tobytes()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_decoding_takes_little_more_than_the_masks():
    rng = np.random.default_rng(0)
    for share in (0.999, 0.8, 0.6):
        packed = {"layer": np.packbits(rng.random(5_000_000, dtype=np.float32) < share)}  # one layer: the hardest case
        blob = MaskBlob.parse(encode_masks(packed))
        tracemalloc.start()
        decode_masks(blob, blob.size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * blob.size + 3_000_000, share


def blob() -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(encode_masks(masks()), np.uint8).copy())


def test_a_file_can_be_verified_wherever_its_blob_is(tmp_path):
    for name in ("base_model.model.smn_masks", "smn_masks"):
        write_adapter_file(tmp_path / "adapter_model.safetensors", {name: blob()})
        assert any("checksum" in fact for fact in verify_adapter_file(tmp_path))


def test_masks_of_another_kind_are_refused_by_every_reader(tmp_path):
    """What the fuzzer's files led to: `inspect` and `verify` passed them to numpy, which raises a TypeError."""
    path = tmp_path / "adapter_model.safetensors"
    kinds = ("BF16", [4]), ("F8_E4M3", [8]), ("F4", [16]), ("F32", [2]), ("U8", [2, 4])
    for name in ("a.smn_masks", "smn_masks", "a.smn_mask"):
        for dtype, shape in kinds:
            header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
            for reader in (
                verify_adapter_file,
                inspect_adapter,
                lambda at: unpack_tensors(read_adapter_file(at), LIMIT),
            ):
                with pytest.raises(AdapterFileError):
                    reader(path)


def test_masks_that_are_coded_twice_are_refused(tmp_path):
    save_file({"a.smn_masks": blob(), "b.smn_masks": blob()}, tmp_path / "adapter_model.safetensors")
    for reader in (verify_adapter_file, inspect_adapter):
        with pytest.raises(AdapterFileError, match=r"coded masks twice, as a\.smn_masks and b\.smn_masks"):
            reader(tmp_path)
