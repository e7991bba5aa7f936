# SPDX-License-Identifier: Apache-2.0
"""Budgets that a mask meets at the end of training: bytes of its coded file, multiplications of its sliced model.

Both are met by a pull on the scores whose weight is found while training, and by moving the threshold at the end.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..functional.distributed import unsharded
from ..functional.masking import straight_through
from ..storage.adapter_file import WEIGHTS_NAME
from ..tuner import MaskLayer
from ..tuner.targets import base_model_of, hidden_channels

_EVERY = 5  # steps between two measurements
_POWER = 0.25  # of what a mask takes of the plan, by which the rate is multiplied
_PLANNED = 0.4  # of the steps after the first weight is off, a mask may take all of the budget
_TERM = 0.25  # rate · bits per weight, where trials on CIFAR-10 ended: what the first rate is guessed by
_LEAST = 0.98  # of the budget that a finished file takes, where weights are at hand to switch off
_AIM = 0.995  # of the budget, where the first move missed it
_PULL = 2e-4  # gradient of a row's or column's score to begin with
_SLOWLY = 0.6  # of the steps after the first channel is off, the multiplications may take to fall
_AHEAD = 20  # steps that are looked ahead
_GAIN = 8.0  # how fast the weight grows with what the share is above the plan
_REACH = 0.5  # of the way from the threshold to the start, by which the threshold rises at most
_BINDS = 0.01  # of the first rate: below it the mask has been free to grow


class BudgetError(ValueError):
    """A budget that no mask of the model could meet."""


class BytesBudget(nn.Module):
    """Finds the rate λ (`MaskConfig.rate`) at which the coded file of a mask has at most so many bytes.

    Every few steps the mask is measured at its entropy, and λ multiplied by a power of what it takes of a plan: dual
    ascent on log λ. The plan rises from nothing, when the first weight is off, to the whole budget. At the end the
    threshold moves until the file is within the budget as it is saved.

    Attributes:
        rate: λ, 0-dim fp64, which is the config's too.
        first: Step at which the first weight was off, 0-dim int64; -1 before.

    Raises:
        BudgetError: If the file is larger without a single weight off.
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
            raise BudgetError(f"{what}. Allow more{narrower}.")
        self.bits = 8.0 * (max_bytes - fixed)  # for masks
        self.first_rate = config.rate or _TERM * model.code_length()[1] / self.bits
        self.register_buffer("rate", torch.tensor(self.first_rate, dtype=torch.float64))
        self.register_buffer("first", torch.tensor(-1))

    def term(self, model: Any) -> Tensor | None:
        """Nothing beside [`MaskModel.rate`], which the loss has anyway."""
        return None

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
        """Move the scores, and so the threshold, until the file is within the budget, and near it if it was held."""
        goal, size = self.bits, file_size(model)
        reach = _REACH if self.rate > _BINDS * self.first_rate else 0.0
        for _ in range(10):
            if _LEAST * self.max_bytes <= size <= self.max_bytes:
                return
            at_end = _move(model, scores, goal, reach)
            size = file_size(model)
            if at_end and size <= self.max_bytes:
                return
            goal += 8 * (_AIM * self.max_bytes - size)
        while size > self.max_bytes:  # few weights, each of which takes a part of the budget
            goal = 0.98 * min(goal, self.bits)
            _move(model, scores, goal, reach)
            size = file_size(model)


def _move(model: Any, scores: Sequence[Tensor], bits: float, reach: float) -> bool:
    """Shift all scores so that the masks take at most so many bits; returns whether they can take no more."""
    config = model.active_peft_config
    shift = reach * (config.init_score - config.threshold)
    if not (at_end := float(model.code_length(offset=shift)[0]) <= bits):
        low = min(float(unsharded(each).min()) for each in scores) - config.threshold - 1e-6  # every weight on
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


# --- Multiplications -------------------------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """Hidden channels that a mask may switch off, and the layers that would be smaller without them."""

    masked: list[MaskLayer]
    producer: str
    consumer: str


class FlopsBudget(nn.Module):
    """Finds the pull on rows and columns at which the sliced model takes at most a share of multiplications.

    The share is of the whole model's. That of a layer falls with those of its inputs and outputs which are on,
    straight through to the scores. Every few steps its weight in the loss is multiplied by the exponential of what
    the share, as it falls, will be above a plan, which goes from 1, when the first channel is off, to the budget. At
    the end the threshold of rows and columns moves where the budget is not met.

    Attributes:
        weight: Weight of the share in the loss, 0-dim fp64.
        first: Step at which the first channel was off, 0-dim int64; -1 before.
        last: The share at the last measurement, 0-dim fp64.

    Raises:
        ValueError: No rows or columns train that could be cut out.
        BudgetError: Not enough of them do.
    """

    weight: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, model: Any, max_flops: float, images: Tensor) -> None:
        """Take a `PeftModel` whose active adapter masks rows or columns, and images (1, 3, height, width)."""
        super().__init__()
        self.max_flops, self.adapter = max_flops, model.active_adapter
        base = base_model_of(model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            base.eval()(images)
        counts = {name.partition(".")[2]: sum(own.values()) for name, own in counter.get_flop_counts().items()}
        self.total = counter.get_total_flops()
        layers = dict(base.named_modules())
        self.channels = []
        for producer, consumer in hidden_channels(base):
            kinds = (layers[producer], "row"), (layers[consumer], "column")
            masked = [layer for layer, kind in kinds if isinstance(layer, MaskLayer) and self._masks(layer, kind)]
            if masked:
                self.channels.append(_Channels(masked, producer, consumer))
        self.counts = {name: counts[name] for each in self.channels for name in each[1:]}
        if not self.channels:
            fix = "set mask.granularity to column+weight"
            raise ValueError(f"max_flops cuts hidden channels out, and none are masked: {fix}, or row, column.")
        if (least := 1 - sum(self.counts.values()) / self.total) >= max_flops:
            what = f"max_flops={max_flops:g} cannot be met: what is not masked as hidden channels takes {least:.2f}"
            raise BudgetError(f"{what} of the multiplications. Allow more.")
        number = sum(self._scores(each)[0].numel() for each in self.channels)
        self.register_buffer("weight", torch.tensor(_PULL * number / (1 - least), dtype=torch.float64))
        self.register_buffer("first", torch.tensor(-1))
        self.register_buffer("last", torch.ones((), dtype=torch.float64))

    def _masks(self, layer: MaskLayer, kind: str) -> bool:
        info = layer.smn_info.get(self.adapter)
        return info is not None and info.granularity.startswith(kind)

    def _live_scores(self, channels: _Channels) -> list[nn.Parameter]:
        names = ((layer, layer.present_slots[0].unit_scores_name) for layer in channels.masked)
        return [layer.parameters_of(self.adapter)[name] for layer, name in names]

    def _scores(self, channels: _Channels) -> list[Tensor]:
        return [unsharded(each).flatten() for each in self._live_scores(channels)]

    def share(self, offset: float = 0.0) -> Tensor:
        """Share of the multiplications that remain, 0-dim fp32; `offset` is added to the threshold."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for each in self.channels:
            spec = each.masked[0].smn_info[self.adapter].spec
            spec = replace(spec, threshold=spec.threshold + offset)
            masks = [straight_through(scores, spec, torch.float32) for scores in self._scores(each)]
            outputs[each.producer] = inputs[each.consumer] = reduce(torch.mul, masks).mean()
        one = next(iter(inputs.values())).new_ones(())
        parts = [count * inputs.get(name, one) * outputs.get(name, one) for name, count in self.counts.items()]
        return torch.stack(parts).sum() / self.total + 1 - sum(self.counts.values()) / self.total

    def term(self, model: Any) -> Tensor | None:
        """The weighted share, a term of the loss."""
        return self.weight.float() * self.share()

    @torch.no_grad()
    def before_step(self, model: Any, step: int, steps: int) -> None:
        """Set the weight for a step of so many."""
        if step % _EVERY or (share := float(self.share())) == 1:
            return
        if self.first < 0:
            self.first.fill_(step)
        ahead = min(_AHEAD, max(0, steps - step)) / _EVERY  # measurements: scores go on falling for a while
        expected = share + ahead * (share - float(self.last))
        passed = step - int(self.first) + _EVERY * (1 + ahead)
        planned = 1 - (1 - self.max_flops) * min(1.0, passed / max(1.0, _SLOWLY * (steps - int(self.first))))
        self.weight.mul_(math.exp(min(1.0, max(-1.0, _GAIN * (expected - planned)))))
        self.last.fill_(share)

    @torch.no_grad()
    def finish(self, model: Any, scores: Sequence[Tensor]) -> None:
        """Move the scores of rows and columns, and so their threshold, until the share is within the budget."""
        if float(self.share()) <= self.max_flops:
            return
        own = [each for channels in self.channels for each in self._live_scores(channels)]
        low, high = 0.0, max(float(unsharded(each).max()) for each in own) - float(model.active_peft_config.threshold)
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if float(self.share(middle)) <= self.max_flops else (middle, high)
        for each in own:
            each.sub_(high)
