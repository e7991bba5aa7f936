# SPDX-License-Identifier: Apache-2.0
"""The learning rate's factor against its formula, at the ends and in between."""

from __future__ import annotations

import math

import pytest
from torch.optim.lr_scheduler import CosineAnnealingLR

from smn_peft.training import Trainer
from smn_peft.training.task import warmup_cosine

from .helpers import Batches, loop, supervised_task


def test_warmup_starts_at_one_part_and_not_at_zero():
    assert [warmup_cosine(e, 150, 40) for e in range(3)] == pytest.approx([1 / 40, 2 / 40, 3 / 40])
    assert warmup_cosine(39, 150, 40) == 1.0
    assert warmup_cosine(40, 150, 40) == 1.0


@pytest.mark.filterwarnings("error")
def test_a_warmup_of_the_whole_run_is_warned_of(tmp_path):
    Trainer(supervised_task(), Batches(), loop(tmp_path, warmup_epochs=2, max_steps=10))
    with pytest.warns(UserWarning, match=r"warmup_epochs=10 is the whole run of 2\.5 epochs: its learning rate only"):
        Trainer(supervised_task(), Batches(), loop(tmp_path, warmup_epochs=10, max_steps=10))


def test_a_rate_that_moves_by_epochs_stays_within_each(tmp_path):
    lines = Trainer(supervised_task(), Batches(), loop(tmp_path, schedule_every="epoch")).train()
    rates = {name: [line[name] for line in lines] for name in lines[0] if name.startswith("lr_")}
    assert len(rates) == 2
    for found in rates.values():
        assert found == pytest.approx([found[0] * warmup_cosine(step // 4, 3) for step in range(12)])


def test_cosine_is_torchs_after_the_warmup():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = CosineAnnealingLR(optimizer, T_max=110)
    for epoch in range(110):
        assert warmup_cosine(40 + epoch, 150, 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()
    assert warmup_cosine(150, 150, 40) == pytest.approx(0.0, abs=1e-12)


def test_half_way_is_half():
    assert warmup_cosine(50, 100) == pytest.approx(0.5)
    assert warmup_cosine(25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_fractional_warmup_never_exceeds_the_peak():
    assert max(warmup_cosine(step, 10, 2.5) for step in range(10)) <= 1.0


def test_a_run_that_is_all_warmup():
    assert [warmup_cosine(step, 4, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
