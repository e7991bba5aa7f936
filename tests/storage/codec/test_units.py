# SPDX-License-Identifier: Apache-2.0
"""Rows and columns that are off as a whole: found from the bits, coded near their entropy, refused where damaged."""

from __future__ import annotations

import numpy as np
import pytest

from smn_peft.functional.packing import binary_entropy
from smn_peft.storage.codec.blob import MaskBlob, decode_masks, encode_masks
from smn_peft.storage.codec.layer import LayerCode, encode_layer
from smn_peft.storage.codec.units import decode, encode, find_units, needs_before
from smn_peft.storage.files import AdapterFileError


def layer(shape: tuple[int, ...], dim: int | None, off: float, weights_off: float, seed: int = 0) -> np.ndarray:
    """Bits of a weight: of its rows (dim 0) or columns (dim 1) a share is off, and of all weights another."""
    generator = np.random.default_rng(seed)
    bits = generator.random(shape) >= weights_off
    if dim is not None:
        units = generator.random(shape[dim]) >= off
        units[:2] = False, True
        bits &= units.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return bits


LAYERS = {
    "rows": ((768, 192), 0, 0.07, 0.0),
    "rows of a convolution": ((64, 32, 3, 3), 0, 0.3, 0.0),
    "rows and weights": ((768, 192), 0, 0.3, 0.03),
    "half the rows and many weights": ((96, 64, 3, 3), 0, 0.5, 0.3),
    "columns": ((192, 768), 1, 0.2, 0.0),
    "columns and weights": ((192, 768), 1, 0.3, 0.03),
    "columns of a convolution": ((64, 64, 3, 3), 1, 0.4, 0.02),
    "one row": ((200, 80), 0, 0.0, 0.01),
}


@pytest.mark.parametrize("case", LAYERS)
def test_units_are_found_and_take_about_their_entropy(case):
    shape, dim, off, weights_off = LAYERS[case]
    bits = layer(shape, dim, off, weights_off)
    packed = np.packbits(bits)
    code, active, payload = encode(packed)
    assert code & 7 == LayerCode.UNITS
    rest = tuple(d for d in range(len(shape)) if d != dim)
    units = bits.any(rest)
    share, inside = units.mean(), bits.mean() / units.mean()
    entropy = len(units) * binary_entropy(share) + units.sum() * bits.size / len(units) * binary_entropy(inside)
    assert 8 * len(payload) <= 1.03 * entropy + 160
    assert len(payload) < len(encode_layer(packed)[2])
    out = np.zeros_like(packed)
    decode(code, active, memoryview(payload), out)
    assert np.array_equal(out, packed)


@pytest.mark.parametrize("off", [0.001, 0.03, 0.3, 0.5, 0.97])
def test_weights_without_units_are_coded_as_ever(off):
    for seed, shape in enumerate([(64, 64), (192, 768), (64, 32, 3, 3)]):
        packed = np.packbits(layer(shape, None, 0.0, off, seed))
        if find_units(packed) is None:
            assert encode(packed) == encode_layer(packed)
        else:  # most rows are off by chance
            assert off == 0.97
    assert encode(np.zeros(100, np.uint8))[0] == LayerCode.ALL_OFF


def test_a_bias_that_goes_with_its_row_says_the_rows_once():
    bits = layer((768, 192), 0, 0.3, 0.02)
    rows = bits.any(1)
    weight, bias, other = np.packbits(bits), np.packbits(rows), np.packbits(~rows)
    masks = {"fc1.smn_bias_mask": bias, "fc1.smn_mask": weight}
    both = encode_masks(masks)
    blob = MaskBlob.parse(both)
    assert [needs_before(entry.code) for entry in blob.entries] == [False, True]
    assert len(encode_masks({**masks, "fc1.smn_bias_mask": other})) > len(both) + 50
    found = decode_masks(blob, 1 << 20)
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())
    assert np.array_equal(blob.decode_entry(1), weight)


def test_damage_is_refused():
    packed = np.packbits(layer((96, 64), 0, 0.3, 0.05))
    code, active, payload = encode(packed)
    out = np.zeros_like(packed)
    for end in range(len(payload)):
        with pytest.raises(AdapterFileError):
            decode(code, active, memoryview(payload[:end]), out)
    for place in range(len(payload)):
        for bit in range(8):
            broken = bytearray(payload)
            broken[place] ^= 1 << bit
            try:
                decode(code, active, memoryview(broken), out)
            except AdapterFileError:
                continue
            assert int(np.unpackbits(out).sum()) == active
    for other in (code | 16, code | 8):  # of no kind; of the layer before, where there is none
        with pytest.raises(AdapterFileError):
            decode(other, active, memoryview(payload), out)
