# SPDX-License-Identifier: Apache-2.0
"""SwAV under DDP: two processes with half the batch each end where one process with the joined batch ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from smn_peft.functional.distributed import process_count, process_index, sinkhorn
from smn_peft.objectives import create_objective
from smn_peft.training.processes import synchronise_batch_norm
from tests.gloo import run_processes

STEPS, BATCH = 6, 16
OPTIONS = {
    "hidden_dim": 16,
    "output_dim": 6,
    "prototypes": 12,
    "queue_length": 25,  # no multiple of the batch, nor even: the processes' shares differ
    "queue_from_step": 1,
    "freeze_prototypes_steps": 4,
}
# fp32, over six steps of SGD whose batches were summed in another order; measured: 2e-5 where gradients reach .85.
TOLERANCE = {"rtol": 1e-3, "atol": 5e-5}


class Task(nn.Module):
    """Model and objective as one module, so that DDP wraps both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        )
        self.objective = create_objective("swav", feature_dim=8, options=OPTIONS)

    def forward(self, batch: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return self.objective(self.model, batch)


def train() -> dict[str, Tensor]:
    """Losses, last gradients and final state after a few steps on this process's slice of the joined batches."""
    task = Task()
    wrapped: nn.Module = task
    if process_count() > 1:
        synchronise_batch_norm(task)
        wrapped = DistributedDataParallel(task)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    mine = slice(process_index() * BATCH // process_count(), (process_index() + 1) * BATCH // process_count())
    task.objective.begin(STEPS)
    result: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        crops = [torch.randn(BATCH, 3, size, size, generator=generator)[mine] for size in (12, 12, 8, 8)]
        task.objective.before_step(step)
        outputs = wrapped({"crops": crops})
        outputs["loss"].backward()
        task.objective.after_backward(step)
        result[f"frozen.{step}"] = torch.tensor(task.objective.prototypes.weight.grad is None)
        result |= {f"{name}.{step}": value.detach() for name, value in outputs.items()}
        gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        result |= {f"grad.{step}.{name}": grad.clone() for name, grad in gradients.items()}
        optimizer.step()
        optimizer.zero_grad()
    return result | {f"state.{name}": value.clone() for name, value in task.state_dict().items()}


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    one, ranks = train(), run_processes(train, 2, tmp_path)
    assert [bool(one[f"frozen.{step}"]) for step in range(STEPS)] == [True] * 4 + [False] * 2
    assert int(one["state.objective.queue_filled"]) == OPTIONS["queue_length"]
    for result in ranks:
        assert result.keys() == one.keys()
        for name in one:
            if not name.startswith(("loss", "codes_entropy")):
                torch.testing.assert_close(result[name], one[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    for name in (n for n in one if n.startswith(("loss", "codes_entropy"))):
        torch.testing.assert_close(torch.stack([r[name] for r in ranks]).mean(), one[name], **TOLERANCE)
    for name in (n for n in ranks[0] if n.startswith("state.")):
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the processes"


def against_lightly(scores: Tensor) -> dict[str, Tensor]:
    """lightly's codes of this rank's slice, and ours."""
    from lightly.loss.swav_loss import sinkhorn as oracle

    share = scores.chunk(process_count())[process_index()]
    return {"theirs": oracle(share, gather_distributed=True), "ours": sinkhorn(share)}


def test_two_processes_equal_lightly_with_gathering(tmp_path):
    pytest.importorskip("lightly.loss.swav_loss", reason="needs the extra: pip install .[oracle]")
    scores = F.normalize(torch.randn(20, 4), dim=1) @ F.normalize(torch.randn(4, 7), dim=0)
    for result in run_processes(against_lightly, 2, tmp_path, scores):
        torch.testing.assert_close(result["ours"], result["theirs"], rtol=1e-4, atol=1e-6)
