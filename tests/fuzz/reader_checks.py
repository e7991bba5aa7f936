# SPDX-License-Identifier: Apache-2.0
"""What must hold of any bytes that the readers of adapters are given; each check raises where it does not."""

from __future__ import annotations

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
        self.chosen = rng.random(2000) < 0.5

    def selected(self, name: str) -> np.ndarray | None:
        """Half of the weights of layer c."""
        return self.chosen if name == "c" else None


@contextmanager
def accelerated() -> Iterator[None]:
    """The accelerated reader is on, interpreted."""
    from smn_peft.storage.codec import layer

    layer._flip_gaps = layer._flip_by_loop
    try:
        yield
    finally:
        layer.accelerate(False)


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
    from smn_peft.storage.codec.blob import MaskBlob, decode_masks

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


def check_layer(data: bytes) -> None:
    """Decode a layer whose payload is DEFLATE of hostile symbols, with a hostile code and count."""
    from smn_peft.storage.codec.layer import deflate
    from smn_peft.storage.codec.units import decode
    from smn_peft.storage.files import AdapterFileError

    if len(data) < 6:
        return
    code, split = data[0] & 31, data[1]
    active, size = struct.unpack_from("<HH", data, 2)
    size %= 300
    payload = memoryview(data[6 : 6 + split] + deflate(data[6 + split :]))

    def read() -> dict[str, bytes]:
        out = np.zeros(size, np.uint8)
        decode(code, active, payload, out, np.frombuffer(data[:2], np.uint8))
        return {"": out.tobytes()}

    masks = by_both_readers(read, AdapterFileError)
    if masks is not None:
        assert int(np.unpackbits(np.frombuffer(masks[""], np.uint8)).sum()) == active


def check_file(data: bytes, path: Path) -> None:
    """Read, verify and inspect a file that has this header, all lengths made right."""
    from smn_peft.storage.adapter_file import read_adapter_file
    from smn_peft.storage.inspection import inspect_adapter, verify_adapter_file
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
