# SPDX-License-Identifier: Apache-2.0
"""InfoNCE against a loop that follows the paper, and two processes against one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from smn_peft.functional.distributed import process_count, process_index
from smn_peft.objectives import create_objective
from smn_peft.objectives.infonce import contrastive_loss
from smn_peft.training.processes import synchronise_batch_norm
from tests.gloo import run_processes

BATCH = 8


@pytest.mark.parametrize("views", [2, 3])
def test_loss_is_that_of_the_papers_loop(views):
    torch.manual_seed(views)
    embeddings = F.normalize(torch.randn(views, 5, 4), dim=2).double().requires_grad_()
    flat, terms = embeddings.flatten(0, 1), []
    for i in range(len(flat)):
        similarities = [torch.dot(flat[i], flat[a]) / 0.3 for a in range(len(flat)) if a != i]
        denominator = torch.stack([s.exp() for s in similarities]).sum()
        positives = [torch.dot(flat[i], flat[p]) / 0.3 for p in range(len(flat)) if p % 5 == i % 5 and p != i]
        terms.append(torch.stack([-(p.exp() / denominator).log() for p in positives]).mean())
    expected = torch.stack(terms).mean()
    loss, _ = contrastive_loss(embeddings, 0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, embeddings)[0] for value in (loss, expected)))


def test_matched_is_the_share_of_views_whose_nearest_is_of_the_same_image():
    anchors = torch.eye(3)
    assert contrastive_loss(torch.stack([anchors, anchors]), 0.1)[1] == 1
    assert contrastive_loss(torch.stack([anchors, anchors.roll(1, 0)]), 0.1)[1] == 0


class Task(nn.Module):
    """Model and objective as one module, so that DDP wraps both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.objective = create_objective("infonce", feature_dim=8, options={"hidden_dim": 16, "output_dim": 6})

    def forward(self, batch: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return self.objective(self.model, batch)


def step() -> dict[str, Tensor]:
    """Mean outputs over the processes and the gradients of a step on this process's slice of the joined batch."""
    task = Task()
    wrapped: nn.Module = task
    if process_count() > 1:
        synchronise_batch_norm(task)
        wrapped = DistributedDataParallel(task)
    mine = slice(process_index() * BATCH // process_count(), (process_index() + 1) * BATCH // process_count())
    crops = [torch.randn(BATCH, 3, size, size, generator=torch.manual_seed(size))[mine] for size in (12, 13, 8)]
    outputs = wrapped({"crops": crops})
    outputs["loss"].backward()
    return {**outputs, **{name: parameter.grad for name, parameter in task.named_parameters()}}


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    one, ranks = step(), run_processes(step, 2, tmp_path)
    for name, expected in one.items():
        of_process = name in ("loss", "matched")  # its mean over the process's own images
        found = [torch.stack([rank[name] for rank in ranks]).mean(0)] if of_process else [rank[name] for rank in ranks]
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
