# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks measured, as rows of one JSON file: written where the variable BENCH_JSON names a file.

A row is one figure of one case: ``{"benchmark": "training", "what": "step: mask / full fine-tuning", "name":
"resnet18", "value": 1.07, "low": 1.06, "high": 1.09, "unit": "ratio", "better": "lower", "target": 1.1, "machine":
{…}}``. `low` and `high` are the quartiles over the rounds, null where there was one round, and `value` itself where
nothing is random, as in the size of a file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smn_peft.storage.files import atomic_write

__all__ = ["BASELINE", "Recorder", "Row", "load", "machine"]

BASELINE = Path(__file__).with_name("baseline.json")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        benchmark: Which benchmark measured it, without ``bench_``.
        what: The figure; a ratio names both its sides, as "mine / the peer's".
        name: The case it was measured on.
        value: The median over the rounds.
        low: First quartile, None if not known.
        high: Third quartile, None if not known.
        unit: "ratio", or what the value is in.
        better: "lower" or "higher"; None for what is shown but never judged, such as a peer's own figure.
        target: What the value should not be worse than, None without one.
        machine: See `machine`.
    """

    benchmark: str
    what: str
    name: str
    value: float
    low: float | None
    high: float | None
    unit: str
    better: str | None
    target: float | None
    machine: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """By which the row is known again: a device's rows are its own."""
        return self.benchmark, self.what, self.name, self.machine["device"]

    @property
    def exact(self) -> bool:
        """Whether nothing about it is random."""
        return self.low == self.value == self.high

    @property
    def misses(self) -> bool:
        """Whether it is worse than its target."""
        if self.target is None:
            return False
        return self.value < self.target if self.better == "higher" else self.value > self.target


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: processor and its vectors, cores, threads, torch, and "cpu" or the GPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
    }


def load(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not what a `Recorder` writes.
    """
    try:
        return [Row(**row) for row in json.loads(Path(path).read_text("utf-8"))["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what the benchmarks write ({error!r}): delete it, `make bench`.") from error


class Recorder:
    """Adds a benchmark's rows to the file, each at once, so that what a crash leaves is whole.

    A row takes the place of the one with its key. Benchmarks that run at the same time lose each other's rows, beside
    disturbing each other's times.
    """

    def __init__(self, benchmark: str, device: str = "cpu", path: str | os.PathLike[str] | None = None) -> None:
        """Record into `path`, by default what BENCH_JSON names; nothing is written without either."""
        self.benchmark, self.device = benchmark, device
        self.path = path or os.environ.get("BENCH_JSON") or None
        self._added: set[tuple[str, ...]] = set()

    def add(
        self,
        what: str,
        name: str,
        measured: float | Sequence[float],
        *,
        unit: str = "ratio",
        better: str | None = "lower",
        target: float | None = None,
        exact: bool = False,
    ) -> float:
        """Record one figure, by its rounds or as one number, and return its median.

        Raises:
            ValueError: If it is not finite, or was recorded before by this recorder.
        """
        rounds = list(measured) if isinstance(measured, Sequence) else [measured]
        value = statistics.median(rounds)
        low, high = (value, value) if exact else (None, None)
        if len(rounds) > 1:
            low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
        figures = [None if figure is None else float(f"{figure:.6g}") for figure in (value, low, high)]
        row = Row(self.benchmark, what, name, *figures, unit, better, target, machine(self.device))
        if not all(math.isfinite(figure) for figure in rounds):
            raise ValueError(f"{row.key} is {rounds}, which is not finite.")
        if row.key in self._added:
            raise ValueError(f"{row.key} was recorded before: give its case another name.")
        self._added.add(row.key)
        if self.path is not None:
            self._write(row, Path(self.path))
        return value

    def _write(self, row: Row, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {old.key: old for old in (load(path) if path.exists() else [])} | {row.key: row}
        with atomic_write(path) as file:
            file.write((json.dumps({"rows": [asdict(row) for row in rows.values()]}, indent=1) + "\n").encode())
