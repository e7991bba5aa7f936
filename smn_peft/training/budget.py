# SPDX-License-Identifier: Apache-2.0
"""`Budget`: the rate of a mask that makes its coded file meet a size in bytes, found while training."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.adapter_file import WEIGHTS_NAME

_EVERY = 5  # steps between two measurements
_POWER = 0.25  # of what a mask takes of the plan, by which the rate is multiplied
_PLANNED = 0.4  # of the steps after the first weight is off, a mask may take all of the budget
_TERM = 0.25  # rate · bits per weight, where trials on CIFAR-10 ended: what the first rate is guessed by
_LEAST = 0.98  # of the budget that a finished file takes, where weights are at hand to switch off
_AIM = 0.995  # of the budget, where the first move missed it
_REACH = 0.1  # of the way from the threshold to the start, by which the threshold rises at most


class Budget(nn.Module):
    """Finds the rate λ (`MaskConfig.rate`) at which the coded file of a mask has at most so many bytes.

    Every few steps the mask is measured at its entropy, and λ multiplied by a power of what it takes of a plan: dual
    ascent on log λ. The plan rises from nothing, when the first weight is off, to the whole budget. At the end the
    threshold moves until the file is within the budget as it is saved.

    Attributes:
        rate: λ, 0-dim fp64, which is the config's too.
        first: Step at which the first weight was off, 0-dim int64; -1 before.

    Raises:
        ValueError: If the file is larger without a single weight off.
    """

    rate: Tensor
    first: Tensor

    def __init__(self, model: Any, max_bytes: int) -> None:
        """Take a `PeftModel` whose active adapter is a coded mask with every weight on, and the bytes of its file."""
        super().__init__()
        config, self.max_bytes = model.active_peft_config, max_bytes
        if (fixed := file_size(model)) >= max_bytes:
            narrower = "" if config.save_dtype != "float32" else ", or set save_dtype='bfloat16'"
            what = f"max_bytes={max_bytes} leaves nothing for masks: head, statistics and header take {fixed} bytes"
            raise ValueError(f"{what}. Allow more{narrower}.")
        self.bits = 8.0 * (max_bytes - fixed)  # for masks
        first_rate = config.rate or _TERM * model.code_length()[1] / self.bits
        self.register_buffer("rate", torch.tensor(first_rate, dtype=torch.float64))
        self.register_buffer("first", torch.tensor(-1))

    @torch.no_grad()
    def before_step(self, model: Any, step: int, steps: int) -> None:
        """Set the rate of the config for a step of so many."""
        config = model.active_peft_config
        if step % _EVERY and config.rate:
            return
        if bits := float(model.code_length()[0]):
            if self.first < 0:
                self.first.fill_(step)
            first = int(self.first)
            passed = (step - first + _EVERY) / max(1.0, _PLANNED * (steps - first + _EVERY))
            planned = min(1.0, passed) if first else 1.0  # a run that starts from a mask has weights off already
            self.rate.mul_(min(4.0, max(0.25, bits / (planned * self.bits))) ** _POWER)
        config.rate = float(self.rate)

    @torch.no_grad()
    def finish(self, model: Any, scores: Sequence[Tensor]) -> None:
        """Move the scores, and so the threshold, until the file is within the budget, and near it where it can be."""
        goal, size = self.bits, file_size(model)
        for _ in range(10):
            if _LEAST * self.max_bytes <= size <= self.max_bytes:
                return
            at_end = _move(model, scores, goal)
            size = file_size(model)
            if at_end and size <= self.max_bytes:
                return
            goal += 8 * (_AIM * self.max_bytes - size)
        while size > self.max_bytes:  # few weights, each of which takes a part of the budget
            goal = 0.98 * min(goal, self.bits)
            _move(model, scores, goal)
            size = file_size(model)


def _move(model: Any, scores: Sequence[Tensor], bits: float) -> bool:
    """Shift all scores so that the masks take at most so many bits; returns whether they can take no more."""
    config = model.active_peft_config
    shift = _REACH * (config.init_score - config.threshold)
    if not (at_end := float(model.code_length(offset=shift)[0]) <= bits):
        low = min(float(each.min()) for each in scores) - config.threshold - 1e-6  # every weight on
        high = shift  # too many off
        for _ in range(30):
            shift = (low + high) / 2
            low, high = (shift, high) if float(model.code_length(offset=shift)[0]) <= bits else (low, shift)
        shift = low
    for each in scores:
        each.sub_(shift)
    return at_end


def file_size(model: Any) -> int:
    """Bytes of an adapter's weights file as it would be saved now."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding, which comes before the file is evaluated
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / WEIGHTS_NAME).stat().st_size
