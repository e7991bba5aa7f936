# SPDX-License-Identifier: Apache-2.0
"""What must hold of any bytes that the readers of adapters are given; each check raises where it does not."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

LIMIT = 1 << 16


class Base:
    """What a decoder knows of every layer."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.theta = rng.standard_normal(2000).astype(np.float32)
        self.chosen = rng.random(2000) < 0.5

    def selected(self, name: str) -> np.ndarray | None:
        """Half of the weights of layer c."""
        return self.chosen if name == "c" else None

    def weight(self, name: str) -> np.ndarray:
        """The same weights for all."""
        return self.theta


@contextmanager
def accelerated() -> Iterator[None]:
    """The accelerated reader is on, interpreted."""
    from smn_peft.storage.codec import accelerated

    accelerated._FLIP[:] = [accelerated.flip_gaps]
    try:
        yield
    finally:
        accelerated.accelerate(False)


def by_both_readers(read: Callable[[], dict[str, bytes]], refusals: type[Exception]) -> dict[str, bytes] | None:
    """What numpy's reader and the accelerated one both give, or None where both refuse."""
    results = []
    for fast in (False, True):
        try:
            if fast:
                with accelerated():
                    results.append(read())
            else:
                results.append(read())
        except refusals:
            results.append(None)
    assert results[0] == results[1], "the accelerated reader differs"
    return results[0]


def check_blob(data: bytes, base: Base, known: dict[bytes, dict[str, bytes]]) -> None:
    """Decode a blob: the reader's own error, or masks that have its checksum."""
    from smn_peft.storage.codec import MaskBlob, decode_masks

    try:
        blob = MaskBlob.parse(data)
    except ValueError:
        return
    for knowledge in (base, None):
        masks = by_both_readers(
            lambda: {n: m.tobytes() for n, m in decode_masks(blob, LIMIT, knowledge).items()},  # noqa: B023
            ValueError,
        )
        if masks is None:
            continue
        checksum = zlib.crc32(blob.table)
        for mask in masks.values():
            checksum = zlib.crc32(mask, checksum)
        assert checksum == blob.checksum
        assert sum(map(len, masks.values())) <= LIMIT
        assert known.setdefault(blob.table + struct.pack("<I", checksum), masks) == masks


def check_layer(data: bytes, base: Base) -> None:
    """Decode a layer whose payload is DEFLATE of hostile symbols, with a hostile code and count."""
    from smn_peft.storage.codec import CodecError, decode_layer
    from smn_peft.storage.codec.deflate import deflate

    if len(data) < 6:
        return
    code, split = data[0] & 31, data[1]
    active, size = struct.unpack_from("<HH", data, 2)
    size %= 300
    payload = memoryview(data[6 : 6 + split] + deflate(data[6 + split :]))

    def read() -> dict[str, bytes]:
        out = np.zeros(size, np.uint8)
        decode_layer(code, active, payload, out, base.theta[: 8 * size])
        return {"": out.tobytes()}

    masks = by_both_readers(read, CodecError)
    if masks is not None and 8 * size <= len(base.theta):
        assert int(np.unpackbits(np.frombuffer(masks[""], np.uint8)).sum()) == active or code & 7 in (0, 1)


def check_ranked(data: bytes, base: Base) -> None:
    """Decode a ranked layer of right counts and hostile gaps, and once more in plain Python."""
    from smn_peft.storage.codec import CodecError
    from smn_peft.storage.codec.deflate import deflate
    from smn_peft.storage.codec.ranked import decode_ranked

    if len(data) < 36:
        return
    exponent, shift, ties, size = 1 + data[0] % 5, data[0] // 5 % 3, data[1], 1 + data[2]
    theta = base.theta[:size] if ties & 1 else np.round(base.theta[:size] * (ties >> 4)) / 4
    order = sorted(range(size), key=lambda i: -abs(theta[i]))
    bins = [sorted(order[size * i >> exponent : size * (i + 1) >> exponent]) for i in range(1 << exponent)]
    counts = [byte % min(len(members) + 1, 128) for byte, members in zip(data[4:], bins, strict=False)]
    sizes = [math.log(2) * len(members) for members in bins]
    ks = [c and max(0, math.floor(math.log2(n / c)) - 4 + shift) for c, n in zip(counts, sizes, strict=True)]
    width = sum(c * k for c, k in zip(counts, ks, strict=True))
    rest = data[36:].ljust((width + 7) // 8, b"\0")
    planes, symbols = rest[: (width + 7) // 8], rest[(width + 7) // 8 :]
    if ties & 2:  # as many gaps as there should be
        symbols += bytes(sum(counts))
        ends = [place + 1 for place, symbol in enumerate(symbols) if symbol != 255]
        symbols = symbols[: ends[sum(counts) - 1] if any(counts) else 0]
    payload = bytes([exponent | shift << 4, *counts]) + planes + deflate(symbols)
    try:
        found = np.flatnonzero(decode_ranked(memoryview(payload), sum(counts), theta)).tolist()
    except CodecError:
        found = None
    assert found == plain_ranked(bins, counts, ks, iter(np.unpackbits(np.frombuffer(planes, np.uint8))), symbols)


def plain_ranked(
    bins: list[list[int]], counts: list[int], ks: list[int], low: Iterator[np.uint8], symbols: bytes
) -> list[int] | None:
    """The minority's weights, or None where the gaps do not fit."""
    ends = [place for place, symbol in enumerate(symbols) if symbol != 255]
    if len(ends) != sum(counts) or symbols[-1:] == b"\xff":
        return None
    highs = iter([sum(symbols[first + 1 : last + 1]) for first, last in zip([-1, *ends], ends, strict=False)])
    found = []
    for members, count, k in zip(bins, counts, ks, strict=True):
        at = -1
        for _ in range(count):
            at += 1 + (next(highs) << k) + sum(int(next(low)) << place for place in range(k))
            if at >= len(members):
                return None
            found.append(members[at])
    return sorted(found)


def check_file(data: bytes, path: Path) -> None:
    """Read, verify and inspect a file that has this header, all lengths made right."""
    from smn_peft.storage import inspect_adapter, read_adapter_file, verify_adapter_file
    from smn_peft.storage.repack import unpack_tensors

    header, _, body = data.partition(b"\0")
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d{1,9})\s*\]', header)]
    body = body.ljust(min(max(ends, default=0), LIMIT), b"\0")[: max(ends, default=0)]
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    for read in (
        lambda: unpack_tensors(read_adapter_file(path), LIMIT),
        lambda: verify_adapter_file(path, LIMIT),
        lambda: (str(inspect_adapter(path)), inspect_adapter(path).to_json()),
    ):
        try:
            read()
        except ValueError:
            continue
