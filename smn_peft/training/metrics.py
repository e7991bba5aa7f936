# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl, one line of numbers per logged step, the progress bar, and what stops a run early.

A line of training covers the steps since the line before in its epoch: ``loss`` and the objective's other outputs,
means over steps and processes; ``images_per_second`` of all processes; ``waiting_for_data``, the share of time, 0 to
1, in which the loop waited for a batch to be loaded and sent to the device, mean over processes. As of ``step``, it
has ``epoch``, a fraction; ``density`` of the mask, null without one; ``lr_scores`` and ``lr_head``, the learning
rates. A line of an evaluation has ``step``, ``epoch``, the metrics and ``evaluation``, the images and k; and
``held_out``, by which `keep_best` chooses: where the last state is not the best, one more line of the last step is of
the best.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.loading import STOP_SIGNALS
from ..functional.distributed import read_flags, unsharded
from ..storage.files import atomic_write
from .task import TrainingTask

METRICS_NAME = "metrics.jsonl"
_COLLAPSED_LINES = 5  # lines of the log in a row
_SAME_REQUEST = 1.0  # seconds
_ADVICE = "Lower lr or head_lr, warm up longer, or, under fp16, train in bf16. A last checkpoint is from before."


class MetricsLog:
    """Append lines to ``metrics.jsonl`` of a folder.

    Lines of steps after `from_step` are cut off first, and its evaluation, which follows the checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str], from_step: int = 0) -> None:
        self.path = Path(folder) / METRICS_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.path) if from_step else []
        kept = [line for line in lines if line["step"] < from_step or (line["step"] == from_step and "loss" in line)]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinity become null, since JSON has neither."""
        finite = json.loads(json.dumps(line), parse_constant=lambda name: None)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


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
        means = torch.stack([*self.sums.values()]) / self.count
        # Filled in on the device: copying the number there would wait once more.
        waited = means.new_full((1,), self.waited / (time.perf_counter() - self.started))
        *values, share = self.accelerator.reduce(torch.cat([means, waited]), "mean").tolist()
        rate = self.images * self.accelerator.num_processes / (time.perf_counter() - self.started)
        return {**dict(zip(self.sums, values, strict=True)), "images_per_second": rate, "waiting_for_data": share}


# --- What stops a run early: NaN, an empty mask, collapsed codes, signals --------------------------------------------


class TrainingFailure(RuntimeError):
    """Training cannot go on usefully; the message names the step and the remedy."""


def check_training(task: TrainingTask, loss: Tensor, step: int) -> None:
    """Raise TrainingFailure if the loss or what trains is not finite, or a layer is masked whole.

    Scores that are NaN count as off, and then the loss stays finite.
    """
    parameters = {name: parameter for name, parameter, _ in task.trainable()}
    finite = read_flags([torch.isfinite(unsharded(tensor)).all() for tensor in (*parameters.values(), loss)])
    broken = [name for name, good in zip(parameters, finite, strict=False) if not good]
    what = f"{broken[0]} and {len(broken) - 1} more hold NaN or infinity" if broken else "every parameter is finite"
    if not finite[-1]:
        raise TrainingFailure(f"The loss is {float(loss.mean())} at step {step}; {what}. {_ADVICE}")
    if broken:
        raise TrainingFailure(f"{what} at step {step}. {_ADVICE}")
    left = {} if task.mask_config is None else {name: mask.any() for name, mask in task.model.iter_masks()}
    if empty := [name for name, some in zip(left, read_flags([*left.values()]), strict=True) if not some]:
        what = f"The mask of {empty[0]} is empty at step {step} ({len(empty)} such layers): nothing after it can learn"
        raise TrainingFailure(f"{what}. Lower lr, warm up longer, or leave the layer out with exclude_modules.")


def check_collapse(steps: Sequence[int], problem: str, least: int, grace_steps: int, verbose: bool = True) -> None:
    """Warn of a collapse that the line of the log at ``steps[-1]`` shows, and those in a row before it.

    TrainingFailure once it has lasted, since many runs leave it again: after five lines in a row that span `least`
    steps, once step `grace_steps` is reached.
    """
    since, step = steps[0], steps[-1]
    if verbose and len(steps) == 1:
        warnings.warn(f"Step {step}: {problem} The run is stopped if this lasts.", stacklevel=4)
    if len(steps) >= _COLLAPSED_LINES and step - since >= least and step >= grace_steps:
        raise TrainingFailure(f"Step {step}, and since step {since}: {problem}")


class StopRequest:
    """Context in which a first SIGINT, SIGTERM or SIGUSR1 sets `requested`, and a later one acts as it would outside.

    Signals within a second of the first are the same request: a launcher repeats what the terminal has sent to all.
    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.perf_counter()
        elif time.perf_counter() - self._since > _SAME_REQUEST:
            self.__exit__()
            signal.raise_signal(number)
