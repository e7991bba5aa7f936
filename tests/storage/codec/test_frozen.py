# SPDX-License-Identifier: Apache-2.0
"""Blobs of layout 1 still decode: `frozen_*.smnm` were written once and are never written again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smn_peft.storage.codec.blob import MaskBlob, decode_masks, encode_masks
from smn_peft.storage.codec.layer import LayerCode
from smn_peft.storage.files import AdapterFileError

FOLDER = Path(__file__).parent
COUNT = 6000
YOUNGER = {LayerCode.FOURS, LayerCode.UNITS, LayerCode.NUMBERED}


def numbers(factor: int) -> np.ndarray:
    """(6000,) whole numbers from 0 to 9972 in a scattered order, the same everywhere."""
    index = np.arange(COUNT, dtype=np.int64)
    return (index * index % 9973 * factor + index // 7) % 9973


class Base:
    """One layer is coded only where it trains."""

    def selected(self, name: str) -> np.ndarray | None:
        return numbers(7919) < 5000 if name == "part" else None


def expected() -> dict[str, np.ndarray]:
    large = np.abs(numbers(4421) - 4986) > 4096
    masks = {
        "on": np.ones(COUNT, np.bool_),
        "off": np.zeros(COUNT, np.bool_),
        "most": numbers(577) > 300,
        "few": numbers(577) < 60,
        "half": numbers(577) < 4000,
        "part": (numbers(577) > 900) | (numbers(7919) >= 5000),
        "small stays": ~(large & (numbers(577) < 2500)),
        "large stays": large & (numbers(577) < 2500),
    }
    return {name: np.packbits(mask) for name, mask in masks.items()}


def test_a_frozen_blob_decodes_bit_for_bit():
    blob = MaskBlob.parse((FOLDER / "frozen_entropy.smnm").read_bytes())
    assert {entry.code & 7 for entry in blob.entries} == set(LayerCode) - YOUNGER
    assert [entry.name for entry in blob.entries if entry.selected] == ["part"]
    found, wanted = decode_masks(blob, blob.size, Base()), expected()
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        assert np.array_equal(found[name], mask), name
    # What is written today decodes the same; its bytes are another zlib's affair.
    again = decode_masks(MaskBlob.parse(encode_masks(wanted, base=Base())), blob.size, Base())
    assert all(np.array_equal(again[name], mask) for name, mask in wanted.items())


def test_the_archival_codec_is_not_read():
    data = bytearray((FOLDER / "frozen_entropy.smnm").read_bytes())
    data[5] = 2
    with pytest.raises(AdapterFileError, match="by codec 2, which this smn_peft does not know"):
        MaskBlob.parse(bytes(data))
