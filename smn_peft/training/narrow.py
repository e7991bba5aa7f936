# SPDX-License-Identifier: Apache-2.0
"""Scores and their optimizer state in bf16: half the memory, by steps in fp32 that are rounded stochastically."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..functional import round_stochastically
from .task import TrainingTask

__all__ = ["NarrowAdamW", "NarrowSGD", "narrow_scores", "widen_scores"]


def narrow_scores(task: TrainingTask) -> None:
    """Keep the scores that train in bf16 from now on.

    Raises:
        ValueError: If no mask trains.
    """
    if task.mask_config is None:
        raise ValueError("score_dtype='bfloat16' is of a mask's scores: use it with adapt='mask'.")
    for parameter in _scores(task):
        parameter.data = parameter.data.bfloat16()


def widen_scores(task: TrainingTask) -> None:
    """Make bf16 scores fp32 again; no mask changes."""
    for parameter in _scores(task):
        parameter.data, parameter.grad = parameter.data.float(), None


def _scores(task: TrainingTask) -> list[nn.Parameter]:
    return [parameter for _, parameter, is_scores in task.trainable() if is_scores]


class _Narrow(torch.optim.Optimizer):
    """One parameter after the other, so that only one is ever there in fp32; the others are stepped as they are.

    What is drawn depends on the groups' `rounding_seed` and `rounding_step`, which a checkpoint keeps, and not on the
    process: replicas stay equal.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            group["rounding_step"] = group.get("rounding_step", 0) + 1
            seeds = np.random.SeedSequence([group.get("rounding_seed", 0), group["rounding_step"]])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.device not in generators:
                    generator = torch.Generator(parameter.device)
                    generators[parameter.device] = generator.manual_seed(int(seeds.generate_state(1)[0]))
                self._step_one(parameter, group, generators[parameter.device])
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        narrow, state = parameter.dtype == torch.bfloat16, self.state[parameter]
        value = parameter.float() if narrow else parameter
        grad: Any = parameter.grad
        wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in state.items()}
        self._update(value, grad.to(value.dtype), wide, group)
        if narrow:
            parameter.copy_(round_stochastically(value, generator))
            wide = {name: round_stochastically(t, generator) if t.ndim else t for name, t in wide.items()}
        state.update(wide)

    def _update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class NarrowSGD(_Narrow, torch.optim.SGD):
    """SGD whose bf16 parameters have a bf16 momentum."""

    def _update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        buffers = [state.get("momentum_buffer")]
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        sgd([value], [grad], buffers, **{name: group[name] for name in names})
        if buffers[0] is not None:
            state["momentum_buffer"] = buffers[0]


class NarrowAdamW(_Narrow, torch.optim.AdamW):
    """AdamW whose bf16 parameters have bf16 moments."""

    def _update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        first, second = [state["exp_avg"]], [state["exp_avg_sq"]]
        names = ("amsgrad", "lr", "weight_decay", "eps", "maximize")
        beta1, beta2 = group["betas"]
        options = {name: group[name] for name in names}
        adamw([value], [grad], first, second, [], [state["step"]], beta1=beta1, beta2=beta2, **options)
