# SPDX-License-Identifier: Apache-2.0
"""The accelerated reader against numpy's: the same bits, the same refusals; interpreted where numba is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from smn_peft.storage.codec import CodecError, LayerCode, accelerate, accelerated, decode_layer, encode_layer
from smn_peft.storage.codec.gaps import encode_gaps


@pytest.fixture(params=["interpreted", "compiled"])
def reader(request, monkeypatch) -> Iterator[list[int]]:
    """The accelerated reader is on; the list counts its calls."""
    calls: list[int] = []
    if request.param == "compiled":
        pytest.importorskip("numba")
        accelerate()
        flip = accelerated.compiled()
    else:
        flip = accelerated.flip_gaps

    def counted(*arguments: object) -> bool:
        calls.append(1)
        return flip(*arguments)

    monkeypatch.setattr(accelerated, "_FLIP", [counted])
    yield calls
    accelerate(False)


def decoded(code: int, active: int, payload: bytes, size: int) -> bytes | None:
    """The bytes, or None where they are refused."""
    out = np.empty(size, np.uint8)
    try:
        decode_layer(code, active, memoryview(payload), out)
    except CodecError:
        return None
    return out.tobytes()


def by_numpy(monkeypatch, *arguments) -> bytes | None:
    with monkeypatch.context() as patch:
        patch.setattr(accelerated, "_FLIP", [])
        return decoded(*arguments)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.25, 0.75, 0.9, 0.99, 0.9995])
def test_the_same_bits(reader, share):
    packed = np.packbits(np.random.default_rng(0).random(100_000) < share)
    code, active, payload = encode_layer(packed)
    assert code & 7 in (LayerCode.GAPS_OF_OFF, LayerCode.GAPS_OF_ON, LayerCode.PACKED)
    assert decoded(code, active, payload, len(packed)) == packed.tobytes()
    assert bool(reader) is (code & 7 != LayerCode.PACKED)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.97])
def test_the_same_refusals(reader, monkeypatch, share):
    packed = np.packbits(np.random.default_rng(0).random(2000) < share)
    code, active, payload = encode_layer(packed)
    assert code & 7 in (LayerCode.GAPS_OF_OFF, LayerCode.GAPS_OF_ON)
    refused = 0
    for place in range(8 * len(payload)):
        bent = bytearray(payload)
        bent[place >> 3] ^= 1 << (place & 7)
        found = decoded(code, active, bytes(bent), len(packed))
        assert found == by_numpy(monkeypatch, code, active, bytes(bent), len(packed))
        refused += found is None
    for size, on in ((len(packed) - 1, active), (len(packed) + 1, active), (len(packed), active + 1), (3, 1)):
        found = decoded(code, on, payload, size)
        assert found == by_numpy(monkeypatch, code, on, payload, size)
        refused += found is None
    assert refused > 100


def test_gaps_that_run_over_the_end_of_a_layer(reader, monkeypatch):
    """255s without an end, a gap that ends just inside, and one that ends just outside."""
    for last in (1999, 2000, 2254):
        payload = encode_gaps(np.array([3, last]), 2000)
        found = decoded(LayerCode.GAPS_OF_ON, 2, payload, 250)
        assert found == by_numpy(monkeypatch, LayerCode.GAPS_OF_ON, 2, payload, 250)
        assert (found is None) is (last >= 2000)
    assert reader


def test_without_numba_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"pip install 'smn_peft\[fast\]'"):
        accelerate()
    assert accelerated.compiled() is None


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_it_is_on_until_it_is_off():
    assert accelerated.compiled() is None
    accelerate()
    assert accelerated.compiled() is not None
    accelerate(False)
    assert accelerated.compiled() is None
