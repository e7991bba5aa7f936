# SPDX-License-Identifier: Apache-2.0
"""SGD and AdamW over two groups, scores and the rest; the learning rate over time; steps in bf16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..functional.packing import round_stochastically
from .arguments import LoopArguments
from .task import TrainingTask


def build_optimizer(task: TrainingTask, arguments: LoopArguments) -> torch.optim.Optimizer:
    """Create SGD or AdamW over two groups, each with its peak rate as `peak_lr`; ValueError if nothing trains."""
    adapted: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for _, parameter, is_adapted in task.trainable():
        (adapted if is_adapted else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": adapted, "lr": arguments.lr, "weight_decay": arguments.weight_decay, "name": "scores"},
        {"params": rest, "lr": arguments.head_lr, "weight_decay": arguments.head_weight_decay, "name": "head"},
    ]
    groups = [{**group, "peak_lr": group["lr"]} for group in groups if group["params"]]
    if not groups:
        fix = "Wrap the model with get_peft_model(model, MaskConfig(…)), or call model.requires_grad_(True)."
        raise ValueError(f"Nothing to train: every parameter is frozen. {fix}")
    if arguments.score_dtype == "bfloat16":
        groups[0]["rounding_seed"] = arguments.seed
        if arguments.optimizer == "adamw":
            return NarrowAdamW(groups, lr=arguments.lr)
        return NarrowSGD(groups, lr=arguments.lr, momentum=arguments.momentum)
    # One pass over memory: a third to a fifth of AdamW's time on a CPU, where torch's default is a loop of many.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in adapted + rest) or None
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=arguments.lr, fused=fused)
    sgd = torch.optim.SGD(groups, lr=arguments.lr, momentum=arguments.momentum, fused=fused)
    if fused and arguments.momentum:
        # The fused step refuses a parameter whose first gradient comes later than the others'. Zeros change no number.
        for parameter in adapted + rest:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def warmup_cosine(position: float, total: float, warmup: float = 0.0) -> float:
    """Factor of the learning rate, 0 to 1, after `position` of `total` units: linear warm-up, then a cosine to 0.

    All arguments are in one unit, steps or epochs. The warm-up starts at 1/W; the authors' code (section 4.1) starts
    at 0/W and so spends its first epoch at learning rate 0.
    """
    if position < warmup:
        return min(1.0, (position + 1) / warmup)
    if total <= warmup:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (position - warmup) / (total - warmup))))


# --- Scores and their optimizer state in bf16: steps in fp32, rounded stochastically ---------------------------------


def cast_scores(task: TrainingTask, dtype: torch.dtype) -> None:
    """Convert the scores that train, in place."""
    for _, parameter, is_scores in task.trainable():
        if is_scores:
            parameter.data, parameter.grad = parameter.data.to(dtype), None


class _Narrow(torch.optim.Optimizer):
    """Step bf16 parameters in fp32, one after the other so that only one fp32 copy exists, and round stochastically.

    The noise depends on the first group's `rounding_seed` and `rounding_step`, which checkpoints keep, and not on the
    process, so replicas stay equal.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, generators = self.param_groups, {}
        first = groups[0]
        first["rounding_step"] = first.get("rounding_step", 0) + 1
        seeds = np.random.SeedSequence([first.get("rounding_seed", 0), first["rounding_step"]])
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    if (device := parameter.device) not in generators:
                        generators[device] = torch.Generator(device).manual_seed(int(seeds.generate_state(1)[0]))
                    self._step_one(parameter, group, generators[device])
        finally:
            self.param_groups = groups
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        narrow = parameter.dtype == torch.bfloat16
        wide: Any = nn.Parameter(parameter.float()) if narrow else parameter
        self.param_groups = [{**group, "params": [wide]}]
        if not narrow:
            super().step()
            return
        wide.grad = parameter.grad.float()  # type: ignore[union-attr]
        self.state[wide] = {name: value.float() for name, value in self.state[parameter].items()}
        super().step()
        parameter.copy_(round_stochastically(wide, generator))
        stepped = self.state.pop(wide)
        for name, value in stepped.items():
            self.state[parameter][name] = round_stochastically(value, generator) if value.ndim else value


class NarrowSGD(_Narrow, torch.optim.SGD):
    """SGD whose bf16 parameters have a bf16 momentum."""


class NarrowAdamW(_Narrow, torch.optim.AdamW):
    """AdamW whose bf16 parameters have bf16 moments."""
