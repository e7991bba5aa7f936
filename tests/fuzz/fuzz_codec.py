# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of coded masks: `python tests/fuzz/fuzz_codec.py --seconds 60 --log fuzz.json`.

With atheris installed (`--engine atheris`) the inputs follow coverage; without, they are mutations of real blobs. Half
of the inputs are whole blobs, the others layers whose payload is valid DEFLATE of hostile symbols, which plain
mutation would hardly ever reach. A finding is any exception but the readers' own, or a wrong mask without an error.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import sys
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
    corpus, findings = seeds(base), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    executions, slowest, began = 0, 0.0, time.monotonic()
    while time.monotonic() - began < seconds:
        data = mutated(corpus[int(rng.integers(0, len(corpus)))], rng)
        started = time.monotonic()
        try:
            if executions % 2:
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


def fuzz_by_coverage(seconds: float) -> None:
    """The same checks under atheris, which prints executions and coverage and ends the process itself."""
    import tempfile

    import atheris

    with atheris.instrument_imports(include=["smn_peft.storage"]):
        import smn_peft.storage.codec  # noqa: F401
    base, known = Base(), {}
    corpus = Path(tempfile.mkdtemp())
    for index, data in enumerate(seeds(base)):
        (corpus / f"seed{index}").write_bytes(b"\1" + data)
        (corpus / f"layer{index}").write_bytes(b"\0" + data)

    def one(data: bytes) -> None:
        if data[:1] == b"\1":
            check_blob(data[1:], base, known)
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
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    if options.engine == "atheris":
        fuzz_by_coverage(options.seconds)
        return
    log = fuzz(options.seconds, options.seed)
    print(json.dumps({**log, "findings": len(log["findings"])}))
    if options.log:
        options.log.write_text(json.dumps(log, indent=1))
    sys.exit(bool(log["findings"]))


if __name__ == "__main__":
    main()
