# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl, one line of numbers per logged step, and the progress bar.

A line of training covers the steps since the line before in its epoch: ``loss`` and the objective's other outputs,
means over steps and processes; ``images_per_second`` of all processes; ``waiting_for_data``, the share of time, 0 to
1, in which the loop waited for a batch to be loaded and sent to the device, mean over processes. As of ``step``, it
has ``epoch``, a fraction; ``density`` of the mask, null without one; ``lr_scores`` and ``lr_head``, the learning
rates. A line of an evaluation has ``step``, ``epoch``, the metrics and ``evaluation``, the images and k.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..storage.files import atomic_write

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Append lines to ``metrics.jsonl`` of a folder; lines of steps after `from_step` are cut off first."""

    def __init__(self, folder: str | os.PathLike[str], from_step: int = 0) -> None:
        self.path = Path(folder) / METRICS_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= from_step] if from_step else []
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinity become null, since JSON has neither."""

        def finite(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        line = {"step": step, **{key: finite(value) for key, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a last one that a crash cut short; none if there is no file."""
    path = Path(path)
    lines: list[dict[str, Any]] = []
    for text in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Window:
    """Sums over the steps since the last line of the log; values on a device are read once per line."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.count = self.images = 0
        self.started, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the host's time inside as waiting for data: on a GPU an upper bound of its idle time."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, outputs: Mapping[str, Tensor], images: int) -> None:
        """Add the outputs of one forward."""
        for name, value in outputs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.count += 1
        self.images += images

    def summary(self) -> dict[str, Any]:
        """Means and rates of the window (see the module); every process takes part."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.count
        # Filled in on the device: copying the number there would wait once more.
        waited = means.new_full((1,), self.waited / (time.perf_counter() - self.started))
        values = self.accelerator.reduce(torch.cat([means, waited]), "mean").tolist()
        seconds = time.perf_counter() - self.started
        return {
            **dict(zip(names, values[:-1], strict=True)),
            "images_per_second": self.images * self.accelerator.num_processes / seconds,
            "waiting_for_data": values[-1],
        }


def postfix(values: Mapping[str, Any]) -> str:
    """Format a line for the progress bar."""
    forms = {
        "loss": "loss {:.3f}",
        "density": "density {:.4f}",
        "images_per_second": "images/s {:.0f}",
        "waiting_for_data": "waiting {:.0%}",
    }
    found = ((form, values[name]) for name, form in forms.items())
    return ", ".join(form.format(value) for form, value in found if value is not None and math.isfinite(value))
