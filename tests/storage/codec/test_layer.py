# SPDX-License-Identifier: Apache-2.0
"""Every code of a layer against a plain reference, on random and structured bits, by numpy and by the loop."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from smn_peft.storage.codec import layer
from smn_peft.storage.codec.layer import LayerCode, accelerate, decode_layer, encode_gaps, encode_layer, low_bits
from smn_peft.storage.files import AdapterFileError

from .reference import low_bits as reference_low_bits
from .reference import read_layer, write_gaps

SHARES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)


def random_bits(share: float, size: int, seed: int = 0) -> np.ndarray:
    return np.packbits(np.random.default_rng(seed).random(8 * size) < share)


def structured() -> dict[str, np.ndarray]:
    row = np.zeros((64, 64), np.bool_)
    row[3] = True
    column = np.zeros((64, 64), np.bool_)
    column[:, 7] = True
    last, first = np.zeros(3000, np.bool_), np.zeros(3000, np.bool_)
    last[-1] = first[0] = True
    runs = np.repeat(np.arange(9) % 2 == 0, 400)
    ends = np.zeros(16_000, np.bool_)  # gaps of 254 to 511: where the escape of 255 begins and ends
    ends[np.cumsum([255, 255, 256, 257, 510, 511, 512] + [20] * 600)] = True  # so many that there are no low bits
    cases = {"row": row, "column": column, "last": last, "first": first, "runs": runs, "escapes": ends}
    packed = {name: np.packbits(bits) for name, bits in cases.items()}
    return packed | {f"{name} inverted": ~bits for name, bits in packed.items()}


def fours(count: int) -> np.ndarray:
    """Two of every four bits on, `count` times."""
    on = np.argsort(np.random.default_rng(0).random((count, 4)), axis=1) < 2
    return np.packbits(on)


MASKS = {
    **{f"{count} fours": fours(count) for count in (1, 2, 11, 256, 257, 2001, 2003, 2004)},
    **{f"{share:g} of {size}": random_bits(share, size) for share in SHARES for size in (1, 7, 300)},
    **{f"{share:g} of 1500": random_bits(share, 1500) for share in (0.001, 0.1, 0.4)},
    **{f"{1 - share:g} of {size}": ~random_bits(share, size, 1) for share in SHARES for size in (3, 400)},
    **structured(),
    "on": np.full(999, 255, np.uint8),
    "off": np.zeros(999, np.uint8),
    "empty": np.zeros(0, np.uint8),
    "one byte": np.array([0b10000000], np.uint8),
}


@pytest.fixture(params=["numpy", "interpreted", "compiled"])
def reader(request, monkeypatch) -> Iterator[str]:
    """How gaps are read."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        accelerate()
    elif request.param == "interpreted":  # what numba compiles
        monkeypatch.setattr(layer, "_flip_gaps", layer._flip_by_loop)
    yield request.param
    monkeypatch.undo()
    accelerate(False)


def decoded(code: int, active: int, payload: bytes, size: int) -> np.ndarray:
    out = np.full(size, 170, np.uint8)  # whatever was there before is overwritten
    decode_layer(code, active, memoryview(payload), out)
    return out


def refused(code: int, active: int, payload: bytes, size: int) -> bool:
    try:
        decoded(code, active, payload, size)
    except AdapterFileError:
        return True
    return False


def test_layers_round_trip_and_the_reference_reads_them(reader):
    for name, packed in MASKS.items():
        code, active, payload = encode_layer(packed)
        assert active == int(np.unpackbits(packed).sum()), name
        assert np.array_equal(decoded(code, active, payload, len(packed)), packed), name
        if reader == "numpy":
            assert read_layer(int(code), active, payload, len(packed)) == packed.tobytes(), name


def test_gaps_are_those_of_the_reference(reader):
    for name, packed in MASKS.items():
        bits = np.unpackbits(packed)
        for minority in (0, 1):
            positions = np.flatnonzero(bits == minority)
            if len(positions) in (0, len(bits)):  # constant: never coded by gaps
                continue
            shift = len(name) % 4
            planes, symbols = write_gaps(bits.tolist(), minority, shift)
            payload = encode_gaps(positions, len(bits), shift)
            assert payload[: len(planes)] == planes, name
            assert zlib.decompress(payload[len(planes) :], -15) == symbols, name
            code = LayerCode.GAPS_OF_ON if minority else LayerCode.GAPS_OF_OFF
            assert np.array_equal(decoded(code + 8 * shift, int(bits.sum()), payload, len(packed)), packed), name


def test_low_bits_are_those_of_the_formula():
    for total in (8, 1000, 589_824, 2_359_296, 1 << 33):
        for count in {1, 2, 3, 7, 100, total // 3, total // 44, total // 1000} - {0}:
            # 65536 ln 2 is 45426.09…: the whole-number form may differ only on the edge itself
            assert low_bits(total, count) == reference_low_bits(total, count), (total, count)


def test_a_layer_of_many_pieces_round_trips():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.15, 0.4):  # more symbols than one piece, with and without low bits
        packed = np.packbits(rng.random(3_000_000, dtype=np.float32) < share)
        code, active, payload = encode_layer(packed)
        assert np.array_equal(decoded(code, active, payload, len(packed)), packed)


def test_the_code_and_its_size_against_the_entropy():
    for share, code, bound in (
        (0.5, LayerCode.PACKED, 1.001),
        (0.346, LayerCode.PACKED, 1.02),
        (0.1, LayerCode.GAPS_OF_ON, 1.02),
        (0.01, LayerCode.GAPS_OF_ON, 1.02),
        (0.001, LayerCode.GAPS_OF_ON, 1.05),
        (0.9, LayerCode.GAPS_OF_OFF, 1.02),
        (0.999, LayerCode.GAPS_OF_OFF, 1.05),
    ):
        packed = random_bits(share, 294_912)
        chosen, active, payload = encode_layer(packed)
        assert chosen % 8 == code
        p = active / (8 * len(packed))
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * len(packed)
        assert len(payload) <= bound * entropy
    for name, code in (("on", LayerCode.ALL_ON), ("off", LayerCode.ALL_OFF)):
        assert encode_layer(MASKS[name])[::2] == (code, b"")  # constant layers cost nothing


def test_what_is_decoded_is_bounded_by_the_layer(reader):
    """A small payload of a large stream gives an error as soon as it is too large, not a large array."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(20_000_000)) + coder.flush()
    assert len(bomb) < 60_000
    for code, active in ((LayerCode.PACKED, 400), (LayerCode.GAPS_OF_ON, 400), (LayerCode.GAPS_OF_OFF, 400)):
        assert refused(code, active, bomb, 1000)


def test_counts_that_contradict_the_code_are_refused():
    packed = random_bits(0.1, 1000)
    active, payload = int(np.unpackbits(packed).sum()), encode_gaps(np.flatnonzero(np.unpackbits(packed)), 8000)
    code = LayerCode.GAPS_OF_ON
    for wrong in (0, 1, active - 1, active + 1, 8000, 9000, -5):
        assert refused(code, wrong, payload, 1000)
    for wrong in (6, 4 + 8, 0 + 8, 1 + 24, 2 + 32, 3 + 64, 5 + 8, 7 + 8, 255):
        with pytest.raises(AdapterFileError, match="layer code"):
            decoded(wrong, active, payload, 1000)
    assert refused(LayerCode.ALL_ON, 7, b"", 1000)
    assert refused(LayerCode.ALL_ON, 8000, b"x", 1000)
    assert refused(code, active, payload + b"x", 1000)
    assert refused(LayerCode.PACKED, active, b"", 1000)


@pytest.mark.parametrize(("share", "size"), [(0.1, 1000), (0.002, 20_000), (0.995, 8000)])
def test_numbers_that_are_none_are_refused(share, size):
    packed = random_bits(share, size)
    code, active, payload = encode_layer(packed)
    assert code == LayerCode.NUMBERED
    for wrong in (0, 1, 8 * size, 8 * size + 100, -5, 4 * size):
        assert refused(code, wrong, payload, size)
    assert refused(code, active, payload[:-1], size)
    assert refused(code, active, payload + b"x", size)
    assert refused(code, active, b"\xff" * len(payload), size)
    for wrong in (active - 1, active + 1):  # may be others' number: the blob has a checksum
        assert refused(code, wrong, payload, size) or np.unpackbits(decoded(code, wrong, payload, size)).sum() == wrong
    assert refused(code, 300_000, payload, 100_000)  # so many are not numbered


def test_fours_that_are_none_are_refused():
    packed = fours(999)  # half a byte is left
    code, active, payload = encode_layer(packed)
    assert (code, active, len(payload)) == (LayerCode.FOURS, 1998, -(-13 * 200 // 8))
    cut, longer, large = payload[:-1], payload + b"x", b"\xff" * len(payload)
    hostile = [(cut, active, 500), (longer, active, 500), (large, active, 500)]
    for wrong, count, size in (*hostile, (payload, 1996, 500), (payload, 1997, 500), (payload, active, 501)):
        assert refused(code, count, wrong, size)
    past = int.from_bytes(payload, "big") + 6**4  # the last of 1000 digits, which is of no four, is 1
    assert refused(code, active, past.to_bytes(len(payload), "big"), 500)


def test_gaps_that_run_over_the_end_of_a_layer(reader):
    """255s without an end, a gap that ends just inside, and one that ends just outside."""
    for last in (1999, 2000, 2254):
        assert refused(LayerCode.GAPS_OF_ON, 2, encode_gaps(np.array([3, last]), 2000), 250) is (last >= 2000)


def test_the_loop_and_numpy_refuse_the_same(monkeypatch):
    for share in (0.02, 0.2, 0.97):
        packed = np.packbits(np.random.default_rng(0).random(1000) < share)
        active, minority = int(np.unpackbits(packed).sum()), int(share < 0.5)
        code = LayerCode.GAPS_OF_ON if minority else LayerCode.GAPS_OF_OFF
        payload = encode_gaps(np.flatnonzero(np.unpackbits(packed) == minority), 1000)
        hostile = [(code, on, payload, size) for size, on in ((124, active), (126, active), (125, active + 1), (3, 1))]
        for place in range(8 * len(payload)):
            bent = bytearray(payload)
            bent[place >> 3] ^= 1 << (place & 7)
            hostile.append((code, active, bytes(bent), len(packed)))
        by_numpy = [None if refused(*arguments) else decoded(*arguments).tobytes() for arguments in hostile]
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_flip_gaps", layer._flip_by_loop)
            assert [None if refused(*a) else decoded(*a).tobytes() for a in hostile] == by_numpy
        assert by_numpy.count(None) > len(hostile) / 10
