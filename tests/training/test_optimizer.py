# SPDX-License-Identifier: Apache-2.0
"""The fused step against torch's loop, with a parameter whose first gradient comes late, as SwAV's prototypes do."""

from __future__ import annotations

import pytest
import torch

from smn_peft.training.task import build_optimizer

from .helpers import loop, supervised_task


@pytest.mark.parametrize(
    ("arguments", "reference"),
    [
        ({"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
        ({"optimizer": "sgd", "momentum": 0.0}, torch.optim.SGD),
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
    ],
    ids=["momentum", "plain", "adamw"],
)
def test_it_steps_as_torch_s_loop_does(arguments, reference, tmp_path):
    def run(fused: bool) -> list[torch.Tensor]:
        task = supervised_task()
        settings = loop(tmp_path, lr=0.3, head_lr=0.1, **arguments)
        optimizer = build_optimizer(task, settings)
        assert optimizer.param_groups[0]["fused"]
        if not fused:
            options = {"momentum": settings.momentum} if reference is torch.optim.SGD else {}
            kept = ("params", "lr", "weight_decay")
            groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]
            optimizer = reference(groups, foreach=False, **options)
        parameters = [parameter for _, parameter, _ in task.trainable()]
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step < 2:
                parameters[-1].grad = None
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for mine, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
