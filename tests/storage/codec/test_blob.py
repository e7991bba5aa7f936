# SPDX-License-Identifier: Apache-2.0
"""The blob: round trips, selective masking, every truncation and flipped bit, hostile headers and tables."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from smn_peft.storage.codec.blob import LayerEntry, MaskBlob, decode_masks, encode_masks, read_table, write_table
from smn_peft.storage.codec.layer import LayerCode, deflate
from smn_peft.storage.files import AdapterFileError

LIMIT = 1 << 20


def bits(share: float, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    """Small layers of several codes, and sizes that are no multiple of 8."""
    return {
        "10.on": np.full(64, 255, np.uint8),
        "9.off": np.zeros(3, np.uint8),
        "8.few": np.packbits(bits(0.01, 1501)),
        "7.most": np.packbits(bits(0.95, 2000)),
        "6.half": np.packbits(bits(0.5, 801)),
        "5.none": np.zeros(0, np.uint8),
        "4.fours": np.packbits(np.argsort(np.random.default_rng(0).random((301, 4)), axis=1) < 2),
    }


class Base:
    """The base of one layer, and which of its weights train."""

    def __init__(self, chosen: np.ndarray | None = None) -> None:
        self.chosen = chosen

    def selected(self, name: str) -> np.ndarray | None:
        return self.chosen


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_masks_round_trip_by_every_code(masks):
    masks |= {f"{share} of many": np.packbits(bits(share, 20_001)) for share in (0.1, 0.5, 0.9)}
    masks["units"] = np.packbits(bits(0.5, 100)[:, None] & bits(0.9, 20_000).reshape(100, -1))
    blob = MaskBlob.parse(encode_masks(masks))
    assert same(decode_masks(blob, LIMIT), masks)
    assert {entry.code & 7 for entry in blob.entries} == set(LayerCode)
    assert {entry.name: entry.size for entry in blob.entries} == {name: len(m) for name, m in masks.items()}
    for index, entry in enumerate(blob.entries):
        assert 8 * entry.coded - entry.inactive == int(np.unpackbits(masks[entry.name]).sum())
        assert np.array_equal(blob.decode_entry(index), masks[entry.name])


def test_the_bytes_do_not_depend_on_the_order(masks):
    assert encode_masks(masks) == encode_masks(dict(reversed(masks.items())))
    assert same(decode_masks(MaskBlob.parse(encode_masks({})), 0), {})


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_what_selective_masking_leaves_on_costs_no_bits(share):
    chosen = bits(0.1, 20_001, seed=1)
    mask = bits(share, 20_001) | ~chosen
    packed = {"layer": np.packbits(mask)}
    data = encode_masks(packed, base=Base(chosen))
    alone = encode_masks({"layer": np.packbits(mask[chosen])})
    assert len(data) <= len(alone) + 8
    assert len(data) < 0.6 * len(encode_masks(packed))
    blob = MaskBlob.parse(data)
    assert same(decode_masks(blob, LIMIT, Base(chosen)), packed)
    with pytest.raises(ValueError, match="Load the adapter over its base"):
        decode_masks(blob, LIMIT)
    with pytest.raises(AdapterFileError, match="load the base that"):
        decode_masks(blob, LIMIT, Base(chosen[:19_000]))
    other = np.roll(chosen, 1)
    with pytest.raises(AdapterFileError, match="checksum"):
        decode_masks(blob, LIMIT, Base(other))


def test_no_checksum_passes_for_another(masks):
    data = encode_masks(masks)
    checksum = MaskBlob.parse(data).checksum
    own = struct.pack("<I", checksum)
    assert data.count(own) == 1
    for other in (0, checksum ^ 1, 0xFFFFFFFF):
        bent = data.replace(own, struct.pack("<I", other))
        with pytest.raises(AdapterFileError, match=f"the file says {other:08x}"):
            decode_masks(MaskBlob.parse(bent), LIMIT)


def test_a_mask_that_is_off_where_nothing_trains_is_coded_in_full():
    chosen = bits(0.1, 5000, seed=1)
    packed = {"layer": np.packbits(bits(0.5, 5000))}
    blob = MaskBlob.parse(encode_masks(packed, base=Base(chosen)))
    assert not blob.entries[0].selected
    assert same(decode_masks(blob, LIMIT), packed)


def test_masks_beyond_the_limit_are_not_decoded(masks):
    blob = MaskBlob.parse(encode_masks(masks))
    assert same(decode_masks(blob, blob.size), masks)
    with pytest.raises(AdapterFileError, match=f"{blob.size} bytes; at most {blob.size - 1}"):
        decode_masks(blob, blob.size - 1)


def read(data: bytes) -> dict[str, np.ndarray] | None:
    """The masks, or None where the reader refused."""
    try:
        return decode_masks(MaskBlob.parse(data), LIMIT)
    except ValueError:
        return None


def test_every_truncation_and_every_flipped_bit_is_refused_or_harmless(masks):
    data = encode_masks(masks)
    assert all(read(data[:length]) is None for length in range(len(data)))
    assert read(data + b"\0") is None
    harmless = 0
    for place in range(8 * len(data)):
        bent = bytearray(data)
        bent[place >> 3] ^= 1 << (place & 7)
        found = read(bytes(bent))
        assert found is None or same(found, masks), place
        harmless += found is not None
    assert harmless < 64  # the bits that pad a DEFLATE stream's last byte


def blob_of(entries: list[LayerEntry], payload: bytes = b"", **changes: int) -> bytes:
    table = write_table(entries)
    deflated = deflate(table)
    fields = {"layout": 1, "codec": 1, "zero": 0, "count": len(entries), "deflated": len(deflated), "size": len(table)}
    fields |= {"checksum": zlib.crc32(table)} | changes
    return struct.pack("<4sBBHIIII", b"SMNM", *fields.values()) + deflated + payload


def entry(**changes: object) -> LayerEntry:
    fields = {
        "name": "a",
        "size": 8,
        "coded": 8,
        "inactive": 64,
        "code": 0,
        "selected": False,
        "start": 0,
        "length": 0,
    }
    return LayerEntry(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_writer_of_hostile_blobs_can_write_a_good_one():
    data = blob_of([entry()], checksum=zlib.crc32(bytes(8), zlib.crc32(write_table([entry()]))))
    assert same(decode_masks(MaskBlob.parse(data), 8), {"a": np.zeros(8, np.uint8)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": 2}, "layout 2 by codec 1, .*pip install -U"),
        ({"codec": 0}, "codec 0, which this smn_peft does not know"),
        ({"codec": 250}, "codec 250"),
        ({"zero": 1}, "something else"),
        ({"count": 2}, "table"),
        ({"count": 0}, "table"),
        ({"count": 2**32 - 1}, "table"),
        ({"size": 2**32 - 1}, "table"),
        ({"size": 5}, "table"),
        ({"deflated": 2**32 - 1}, "cut off"),
        ({"deflated": 0}, "table"),
    ],
)
def test_headers_that_lie_are_refused(changes, message):
    with pytest.raises(AdapterFileError, match=message):
        MaskBlob.parse(blob_of([entry()], **changes))


@pytest.mark.parametrize(
    "entries",
    [
        [entry(length=5)],
        [entry(), entry()],
        [entry(name="")],
        [entry(inactive=65)],
        [entry(size=1 << 60)],
        [entry(size=8, coded=0, inactive=1)],
        [entry(size=8, coded=-8, inactive=0)],
    ],
    ids=str,
)
def test_tables_that_lie_are_refused(entries):
    with pytest.raises(AdapterFileError):
        MaskBlob.parse(blob_of(entries))


def test_a_table_that_inflates_to_gigabytes_is_refused():
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(1 << 24)) + coder.flush()
    header = struct.pack("<4sBBHIIII", b"SMNM", 1, 1, 0, 1, len(bomb), 1 << 27, 0)
    with pytest.raises(AdapterFileError, match="table"):
        MaskBlob.parse(header + bomb)


def test_a_constant_layer_cannot_promise_what_the_caller_does_not_expect():
    data = blob_of([entry(size=1 << 40, coded=1 << 40, inactive=1 << 43)])
    assert len(data) < 100
    with pytest.raises(AdapterFileError, match="at most 1000"):
        decode_masks(MaskBlob.parse(data), 1000)


def test_a_table_round_trips():
    entries = [
        entry(
            name=f"block.{i}.é", size=2**i, coded=2**i - i, inactive=i, code=i % 5 + 8, selected=i % 2 == 0, length=i
        )
        for i in range(5, 40)
    ]
    found = read_table(write_table(entries), len(entries))
    start = 0
    for given, back in zip(entries, found, strict=True):
        assert back == LayerEntry(**{**vars(given), "start": start})
        start += given.length


@pytest.mark.parametrize("name", ["", "a\nb"])
def test_names_that_the_table_cannot_hold(name):
    with pytest.raises(ValueError, match="cannot name a layer"):
        encode_masks({name: np.zeros(1, np.uint8)})


def test_a_blob_that_is_cut_off_says_so():
    with pytest.raises(AdapterFileError, match="cut off"):
        MaskBlob.parse(b"SMN")
