# SPDX-License-Identifier: Apache-2.0
"""The share of time that training waits for data: exact on a clock that a test moves, on one process and on two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from smn_peft.training import Interrupted, Trainer, metrics
from smn_peft.training.metrics import Window, read_metrics
from tests.gloo import join_group, run_processes

from .helpers import Batches, loop, stop_after, supervised_task


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def passes(self, seconds):
        self.now += seconds


class SlowBatches(Batches):
    def __init__(self, clock, starting, loading):
        super().__init__()
        self.clock, self.starting, self.loading = clock, starting, loading

    def __iter__(self):
        self.clock.passes(self.starting)  # as workers that are started
        return self.batches()

    def batches(self):
        for batch in super().__iter__():
            self.clock.passes(self.loading)
            yield batch


@pytest.mark.parametrize(("loading", "share", "accumulate"), [(0.0, 0.0, 1), (99.0, 0.99, 2)])
def test_it_is_logged_and_goes_on_after_a_resume(tmp_path, monkeypatch, loading, share, accumulate):
    clock, task = Clock(monkeypatch), supervised_task()
    task.register_forward_hook(lambda *_: clock.passes(1.0))
    batches, options = SlowBatches(clock, 0.0, loading), {"accumulate": accumulate, "epochs": 2, "log_every": 2}
    trainer = Trainer(task, batches, loop(tmp_path, **options))
    stop_after(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.train()
    Trainer(task, batches, loop(tmp_path, **options, resume=True)).train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 8 // accumulate + 1, 2))
    assert [line["waiting_for_data"] for line in lines] == pytest.approx([share] * len(lines))


def test_starting_the_loader_counts(tmp_path, monkeypatch):
    clock, task = Clock(monkeypatch), supervised_task()
    task.register_forward_hook(lambda *_: clock.passes(1.0))
    lines = Trainer(task, SlowBatches(clock, 3.0, 0.0), loop(tmp_path, epochs=1)).train()
    assert [line["waiting_for_data"] for line in lines] == [0.75, 0, 0, 0]


def window_of(rank):
    """What a window of 10 s says in which process `rank` waits for 2 + 4 · rank of them."""
    now = iter([0.0, 1.0, 3.0 + 4 * rank, 10.0, 10.0])
    metrics.time = SimpleNamespace(perf_counter=lambda: next(now))
    window = Window(Accelerator(cpu=True))
    with window.waiting():
        pass
    window.add({"loss": torch.tensor(1.0 + rank)}, images=5)
    return {name: torch.tensor(value) for name, value in window.summary().items()}


def in_a_group():
    join_group()
    return window_of(dist.get_rank())


def test_it_is_the_mean_over_processes(tmp_path):
    for result in run_processes(in_a_group, 2, tmp_path):
        assert result == {"loss": 1.5, "images_per_second": 1.0, "waiting_for_data": pytest.approx(0.4)}
