# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of adapters: `python tests/fuzz/fuzz_codec.py --seconds 60 --log fuzz.json`.

With atheris installed (`--engine atheris`) the inputs follow coverage; without, they are mutations of real blobs and
files. Inputs are of three kinds: whole blobs; layers whose payload is valid DEFLATE of hostile symbols, which plain
mutation would hardly ever reach; and safetensors files of a hostile header whose lengths are right. A finding is any
exception but the readers' own, or other masks without an error.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np

LIMIT = 1 << 16
NAMES = ("a", "b", "c", "d")


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


def seeds(base: Base) -> list[bytes]:
    """Real blobs: every code, both codecs."""
    from smn_peft.storage.codec import encode_masks

    blobs = []
    for share in (0.001, 0.02, 0.1, 0.4, 0.99, 1.0):
        rng = np.random.default_rng(0)
        masks = {name: np.packbits((rng.random(2000) < share) | ~base.chosen) for name in NAMES}
        masks["d"] = np.packbits(np.abs(base.theta) > 3 * share)
        blobs += [encode_masks(masks, codec, base) for codec in ("entropy", "archival")]
    return blobs


def check_blob(data: bytes, base: Base, known: dict[bytes, dict[str, bytes]]) -> None:
    """Decode a blob: the reader's own error, or masks that have its checksum."""
    from smn_peft.storage.codec import MaskBlob, decode_masks

    for knowledge in (base, None):
        try:
            blob = MaskBlob.parse(data)
            masks = decode_masks(blob, LIMIT, knowledge)
        except ValueError:
            continue
        checksum = zlib.crc32(blob.table)
        for mask in masks.values():
            checksum = zlib.crc32(mask.tobytes(), checksum)
        assert checksum == blob.checksum
        assert sum(map(len, masks.values())) <= LIMIT
        key = blob.table + struct.pack("<I", checksum)
        assert known.setdefault(key, {n: m.tobytes() for n, m in masks.items()}) == {
            n: m.tobytes() for n, m in masks.items()
        }


def check_layer(data: bytes, base: Base) -> None:
    """Decode a layer whose payload is DEFLATE of hostile symbols, with a hostile code and count."""
    from smn_peft.storage.codec import decode_layer
    from smn_peft.storage.codec.deflate import deflate

    if len(data) < 6:
        return
    code, split = data[0] & 31, data[1]
    active, size = struct.unpack_from("<HH", data, 2)
    out = np.zeros(size % 300, np.uint8)
    payload = data[6 : 6 + split] + deflate(data[6 + split :])
    try:
        decode_layer(code, active, memoryview(payload), out, base.theta[: 8 * len(out)])
    except ValueError:
        return
    if 8 * len(out) <= len(base.theta):
        assert int(np.unpackbits(out).sum()) == active or code & 7 in (0, 1)


def files() -> list[bytes]:
    """Headers of real files, a zero byte, and what follows: coded and bit-packed, with head and statistics."""
    import torch

    from smn_peft.storage.codec import BLOB_NAME, encode_masks
    from smn_peft.storage.finish import write_adapter_file

    masks = {name: np.packbits(np.random.default_rng(0).random(80) < 0.9) for name in "ab"}
    blob = torch.from_numpy(np.frombuffer(encode_masks(masks), np.uint8).copy())
    rest = {"base_model.model.head.weight": torch.ones(2, 3), "base_model.model.n.smn_running_mean": torch.ones(2)}
    packed = {f"base_model.model.{name}.smn_mask": torch.from_numpy(mask) for name, mask in masks.items()}
    found = []
    for tensors in ({f"base_model.model.{BLOB_NAME}": blob, **rest}, {**packed, **rest}, {f"x.{BLOB_NAME}": blob}):
        with tempfile.TemporaryDirectory() as folder:
            write_adapter_file(Path(folder) / "file", tensors, "float32:00")
            data = (Path(folder) / "file").read_bytes()
        end = 8 + struct.unpack_from("<Q", data)[0]
        found.append(data[8:end].rstrip() + b"\0" + data[end:])
    odd = [{"dtype": kind, "shape": [8], "data_offsets": [0, 16]} for kind in ("BF16", "F8_E4M3", "C64")]
    return found + [json.dumps({"x.smn_masks": entry}).encode() + bytes(17) for entry in odd]


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


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few random edits: bits, bytes, numbers at the borders, cuts, copies."""
    bent = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, max(len(bent), 1)))
        kind = int(rng.integers(0, 6))
        if kind == 0 and bent:
            bent[place % len(bent)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            bent[place : place + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 2:
            bent[place : place + 4] = struct.pack("<I", int(rng.choice([0, 1, 255, 65535, 2**31, 2**32 - 1])))
        elif kind == 3:
            del bent[place : place + int(rng.integers(1, 9))]
        elif kind == 4:
            bent[place:place] = bent[:8]
        else:
            bent[place:place] = rng.integers(0, 256, int(rng.integers(1, 40)), dtype=np.uint8).tobytes()
    return bytes(bent)


def fuzz(seconds: float, seed: int = 0) -> dict[str, object]:
    """Mutate and decode for a while; the log."""
    base, rng, known = Base(), np.random.default_rng(seed), {}
    corpus, headers, findings = seeds(base), files(), []
    path = Path(tempfile.mkdtemp()) / "file"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    executions, slowest, began = 0, 0.0, time.monotonic()
    while time.monotonic() - began < seconds:
        real = headers if executions % 3 == 0 else corpus
        data = mutated(real[int(rng.integers(0, len(real)))], rng)
        started = time.monotonic()
        try:
            if executions % 3 == 0:
                check_file(data, path)
            elif executions % 3 == 1:
                check_blob(data, base, known)
            else:
                check_layer(rng.integers(0, 32, 6, dtype=np.uint8).tobytes() + data, base)
        except Exception:
            findings.append({"input": data.hex(), "error": traceback.format_exc(limit=3)})
        slowest = max(slowest, time.monotonic() - started)
        executions += 1
        if len(known) > 1000:
            known.clear()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"executions": executions, "findings": findings, "slowest_s": slowest, "grown_kb": peak, "seconds": seconds}


def fuzz_by_coverage(seconds: float, corpus: Path | None = None) -> None:
    """The same checks under atheris, which prints executions and coverage and ends the process itself.

    Inputs that reach something new stay in the folder `corpus`, for the next run to start from.
    """
    import atheris

    with atheris.instrument_imports(include=["smn_peft.storage"]):
        import smn_peft.storage  # noqa: F401
    base, known = Base(), {}
    corpus = corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(seeds(base)):
        (corpus / f"seed{index}").write_bytes(b"\1" + data)
        (corpus / f"layer{index}").write_bytes(b"\0" + data)
    for index, data in enumerate(files()):
        (corpus / f"file{index}").write_bytes(b"\2" + data)
    path = Path(tempfile.mkdtemp()) / "file"

    def one(data: bytes) -> None:
        if data[:1] == b"\1":
            check_blob(data[1:], base, known)
        elif data[:1] == b"\2":
            check_file(data[1:], path)
        else:
            check_layer(data[1:], base)
        if len(known) > 1000:
            known.clear()

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={int(seconds)}", "-rss_limit_mb=2048", "-timeout=10", str(corpus)], one
    )
    atheris.Fuzz()


def main() -> None:
    """Fuzz and write the log; exit code 1 after a finding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--corpus", type=Path, help="with atheris: a folder that keeps what was reached")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    if options.engine == "atheris":
        fuzz_by_coverage(options.seconds, options.corpus)
        return
    log = fuzz(options.seconds, options.seed)
    print(json.dumps({**log, "findings": len(log["findings"])}))
    if options.log:
        options.log.write_text(json.dumps(log, indent=1))
    sys.exit(bool(log["findings"]))


if __name__ == "__main__":
    main()
