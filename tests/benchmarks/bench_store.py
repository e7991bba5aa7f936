# SPDX-License-Identifier: Apache-2.0
"""A bank's store on disk: opening and lookup from 10 to 10,000 tasks, the size of 1,000 ViT-B tasks, adding.

Targets: lookup flat (at most 1.2 times from 10 to 10,000 tasks), opening in milliseconds, 1,000 tasks of a ViT-B at
99.9 % active in at most 0.13 GB. Tasks of the first table are small, as only their number counts there. The masks of
the second have a ViT-B's shapes and independent bits, which no code makes smaller than their entropy; 8 different ones
take turns, stored 1,000 times. Times are medians, of one thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from recording import Recorder

from smn_peft.bank.source import StoredAdapter
from smn_peft.bank.store import DiskStore
from smn_peft.functional.packing import pack_bits

COUNTS = (10, 1_000, 10_000)
VIT_B = {"qkv": 768 * 2304, "proj": 768 * 768, "fc1": 768 * 3072, "fc2": 768 * 3072}
CONFIG = {"peft_type": "SMN", "base_model_name_or_path": "timm/vit_base_patch16_224.augreg_in21k", "codec": "bits"}
TARGET_GB, TARGET_RATIO = 0.13, 1.2
CASE = "1,000 ViT-B tasks, 99.9 % active"
RECORDER = Recorder("store")


def adapter(shapes: dict[str, int], depth: int, density: float, seed: int) -> StoredAdapter:
    """A task with independent bits."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        f"base_model.model.blocks.{block}.{name}.smn_mask": pack_bits(torch.rand(numel, generator=generator) < density)
        for block in range(depth)
        for name, numel in shapes.items()
    }
    return StoredAdapter(CONFIG, masks)


def median(function: Callable[[], object], repeat: int, what: str, name: str) -> float:
    """Median seconds of a call, recorded in microseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    RECORDER.add(what, name, [1e6 * seconds for seconds in times], unit="µs")
    return statistics.median(times)


def open_and_close(path: Path) -> None:
    """What a process does first."""
    DiskStore(path, read_only=True).close()


def stored(adapters: list[StoredAdapter], folder: Path) -> list[StoredAdapter]:
    """Adapters with their masks coded, as a store gives them."""
    with DiskStore(folder) as store:
        store.add_many((str(number), adapter) for number, adapter in enumerate(adapters))
        return [store.read(str(number)) for number in range(len(adapters))]


def by_number(folder: Path) -> None:
    """Opening and lookup while the number of tasks grows."""
    (small,) = stored([adapter({"fc": 4096}, 4, 0.99, 0)], folder / "small")
    print("| tasks | open, ms | lookup, µs | read, µs | names, ms | add one, ms |\n|---|---|---|---|---|---|")
    lookups = []
    for number in COUNTS:
        path, case = folder / f"of_{number}", f"{number:,} small tasks"
        with DiskStore(path) as store:
            store.add_many((f"task-{index}", small) for index in range(number))
            names: Iterator[str] = (f"task-{7919 * index % number}" for index in count())
            lookups.append(median(lambda: store.version(next(names)), 4000, "lookup", case))  # noqa: B023
            reading = median(lambda: store.read(next(names)), 1000, "read", case)  # noqa: B023
            listing = median(store.names, 5, "names", case)
            extra: Iterator[str] = (f"extra-{index}" for index in count())
            adding = median(lambda: store.add(next(extra), small), 11, "add one", case)  # noqa: B023
        opening = median(lambda: open_and_close(path), 21, "open", case)  # noqa: B023
        print(
            f"| {number:,} | {1e3 * opening:.2f} | {1e6 * lookups[-1]:.1f} | {1e6 * reading:.0f} | "
            f"{1e3 * listing:.2f} | {1e3 * adding:.1f} |"
        )
    what = f"lookup, {COUNTS[-1]:,} / {COUNTS[0]} tasks"
    flat = RECORDER.add(what, "small tasks", lookups[-1] / lookups[0], target=TARGET_RATIO)
    print(f"{what.capitalize()}: {flat:.2f} (target ≤ {TARGET_RATIO})\n")


def vit_b(folder: Path) -> None:
    """A thousand tasks of a ViT-B."""
    start = time.perf_counter()
    coded = stored([adapter(VIT_B, 12, 0.999, seed) for seed in range(8)], folder / "eight")
    fresh = time.perf_counter() - start
    path = folder / "thousand"
    with DiskStore(path) as store:
        start = time.perf_counter()
        store.add_many((f"task-{number}", coded[number % 8]) for number in range(1000))
        adding = time.perf_counter() - start
        names: Iterator[str] = (f"task-{7919 * index % 1000}" for index in count())
        reading = median(lambda: store.read(next(names)), 1000, "read", CASE)
        start = time.perf_counter()
        assert not any(check.error for check in store.verify())
        checking = time.perf_counter() - start
        store.remove_many(f"task-{number}" for number in range(0, 1000, 2))
        start = time.perf_counter()
        before, after = store.compact()
        compacting = time.perf_counter() - start
    opening = median(lambda: open_and_close(path), 21, "open", CASE)
    RECORDER.add("on disk", CASE, before / 1e9, unit="GB", target=TARGET_GB, exact=True)
    for what, speed in (
        ("added, coded already", 1000 / adding),
        ("added, made and coded", 8 / fresh),
        ("verified", 1000 / checking),
        ("compacted", 1000 / compacting),
    ):
        RECORDER.add(what, CASE, speed, unit="tasks/s", better="higher")
    print(f"| {CASE} | |\n|---|---|")
    for what, value in {
        f"on disk, GB (target ≤ {TARGET_GB})": f"{before / 1e9:.4f} in one file",
        "opens in, ms": f"{1e3 * opening:.2f}",
        "read of a task, with its checksum, µs": f"{1e6 * reading:.0f}",
        "added, tasks/s: coded already, decoded to check": f"{1000 / adding:.0f}",
        "added, tasks/s: made, coded and written": f"{8 / fresh:.2f}",
        "verified, tasks/s": f"{1000 / checking:.0f}",
        "compaction without every second task, s": f"{compacting:.2f}: {before / 1e9:.3f} -> {after / 1e9:.3f} GB",
    }.items():
        print(f"| {what} | {value} |")


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        by_number(Path(folder))
        vit_b(Path(folder))


if __name__ == "__main__":
    main()
