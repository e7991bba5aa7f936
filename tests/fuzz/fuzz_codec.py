# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of adapters: `python tests/fuzz/fuzz_codec.py --seconds 60 --log fuzz.json`.

With atheris installed (`--engine atheris`) the inputs follow coverage; without, they are mutations of real blobs and
files. Inputs are of three kinds: whole blobs; layers whose payload is valid DEFLATE of hostile symbols, which plain
mutation would hardly ever reach; and safetensors files of a hostile header whose lengths are right. A finding is any
exception but the readers' own, other masks without an error, or a difference between the reader that numba compiles
(interpreted, so that coverage sees it) and numpy's.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from reader_checks import Base, check_blob, check_file, check_layer

NAMES = ("a", "b", "c", "d")
KINDS = ("layer", "blob", "file")
"""Of inputs: the first byte of one under atheris."""


def seeds(base: Base) -> list[bytes]:
    """Real blobs of every code."""
    from smn_peft.storage.codec.blob import encode_masks

    blobs = []
    for share in (0.001, 0.02, 0.1, 0.4, 0.99, 1.0):
        rng = np.random.default_rng(0)
        masks = {name: np.packbits((rng.random(2000) < share) | ~base.chosen) for name in NAMES}
        blobs.append(encode_masks(masks, base=base))
    return blobs


def files() -> list[bytes]:
    """Headers of real files, a zero byte, and what follows: coded and bit-packed, with head and statistics."""
    import torch

    from smn_peft.storage.adapter_file import write_adapter_file
    from smn_peft.storage.codec.blob import BLOB_NAME, encode_masks

    masks = {name: np.packbits(np.random.default_rng(0).random(80) < 0.9) for name in "ab"}
    blob = torch.from_numpy(np.frombuffer(encode_masks(masks), np.uint8).copy())
    rest = {"base_model.model.head.weight": torch.ones(2, 3), "base_model.model.n.smn_running_mean": torch.ones(2)}
    packed = {f"base_model.model.{name}.smn_mask": torch.from_numpy(mask) for name, mask in masks.items()}
    found = []
    for tensors in ({f"base_model.model.{BLOB_NAME}": blob, **rest}, {**packed, **rest}, {f"x.{BLOB_NAME}": blob}):
        with tempfile.TemporaryDirectory() as folder:
            write_adapter_file(Path(folder) / "file", tensors)
            data = (Path(folder) / "file").read_bytes()
        end = 8 + struct.unpack_from("<Q", data)[0]
        found.append(data[8:end].rstrip() + b"\0" + data[end:])
    odd = [{"dtype": kind, "shape": [8], "data_offsets": [0, 16]} for kind in ("BF16", "F8_E4M3", "C64")]
    return found + [json.dumps({"x.smn_masks": entry}).encode() + bytes(17) for entry in odd]


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
                check_layer(rng.integers(0, 32, 6, dtype=np.uint8).tobytes() + data)
        except Exception:
            findings.append({"input": data.hex(), "error": traceback.format_exc(limit=3)})
        slowest = max(slowest, time.monotonic() - started)
        executions += 1
        if len(known) > 1000:
            known.clear()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"executions": executions, "findings": findings, "slowest_s": slowest, "grown_kb": peak, "seconds": seconds}


def fuzz_by_coverage(seconds: float, corpus: Path | None = None, kinds: tuple[str, ...] = KINDS) -> None:
    """The same checks under atheris, which prints executions and coverage and ends the process itself.

    Inputs that reach something new stay in the folder `corpus`, for the next run to start from.
    """
    import atheris

    with atheris.instrument_imports(include=["smn_peft.storage"]):
        import smn_peft.storage  # noqa: F401
    base, known = Base(), {}
    corpus = corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp()) / "file"
    checks = {
        "layer": check_layer,
        "blob": lambda data: check_blob(data, base, known),
        "file": lambda data: check_file(data, path),
    }
    for kind in kinds:
        for index, data in enumerate(files() if kind == "file" else seeds(base)):
            (corpus / f"{kind}{index}").write_bytes(bytes([KINDS.index(kind)]) + data)

    def one(data: bytes) -> None:
        kind = KINDS[data[0] % len(KINDS)] if data else ""
        if kind in kinds:
            checks[kind](data[1:])
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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="with atheris: of inputs")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    if options.engine == "atheris":
        fuzz_by_coverage(options.seconds, options.corpus, tuple(options.kinds))
        return
    log = fuzz(options.seconds, options.seed)
    print(json.dumps({**log, "findings": len(log["findings"])}))
    if options.log:
        options.log.write_text(json.dumps(log, indent=1))
    sys.exit(bool(log["findings"]))


if __name__ == "__main__":
    main()
