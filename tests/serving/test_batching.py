# SPDX-License-Identifier: Apache-2.0
"""`Batcher`: what waits goes together, one failure is one task's, and nothing submitted is lost."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from smn_peft.serving.batching import Batcher


class Held:
    """A bank of numbers: task "3" adds 3. Its forward waits until it is let go; "bad" does not load, "odd" not run."""

    def __init__(self):
        self.model = nn.Linear(1, 1)
        self.go, self.batches = threading.Event(), []

    def task(self, name):
        if name == "bad":
            raise ValueError("bad")
        return name

    def forward(self, images, tasks):
        assert self.go.wait(10)
        self.batches.append(list(tasks))
        if "odd" in tasks:
            raise RuntimeError("odd")
        features = images.flatten(1) + torch.tensor([[float(task)] for task in tasks])
        return {"logits": features * 2, "features": features[:, None]}


@pytest.fixture
def bank():
    return Held()


def submit(batcher, *tasks):
    return [batcher.submit(torch.full((1, 1, 1), 10.0), task) for task in tasks]


def answers(futures):
    return [future.result(10).features.item() for future in futures]


def test_what_waits_goes_together_up_to_the_bound(bank):
    facts = []
    batcher = Batcher(bank, max_batch=3, max_wait=0.001, watch=lambda *fact: facts.append(fact))
    first = submit(batcher, "1")
    while batcher.depth:  # the thread has taken it, and waits inside
        pass
    rest = submit(batcher, "2", "3", "2", "4")
    bank.go.set()
    assert answers(first + rest) == [11, 12, 13, 12, 14]
    batcher.close()
    assert [task for batch in bank.batches for task in batch] == ["1", "2", "3", "2", "4"]
    assert max(map(len, bank.batches)) == 3
    assert [fact[:2] for fact in facts if fact[0] == 3] == [(3, 2)]
    assert rest[0].result().waited > 0
    assert rest[0].result().logits.tolist() == [24]


def test_samples_that_come_within_the_wait_share_a_batch(bank):
    bank.go.set()
    batcher = Batcher(bank, max_batch=2, max_wait=10)
    assert answers(submit(batcher, "1", "2")) == [11, 12]
    assert bank.batches == [["1", "2"]]
    batcher.close()


def test_one_tasks_failure_is_its_own(bank):
    batcher = Batcher(bank, max_batch=8, max_wait=1)
    futures = submit(batcher, "1", "bad", "odd", "2", "bad")
    bank.go.set()
    batcher.close()
    assert answers([futures[0], futures[3]]) == [11, 12]
    for index, kind in ((1, ValueError), (4, ValueError), (2, RuntimeError)):
        assert type(futures[index].exception(10)) is kind


def test_what_is_cancelled_is_not_computed_and_closing_finishes_the_rest(bank):
    batcher = Batcher(bank, max_batch=2, max_wait=0)
    first = submit(batcher, "1")
    while batcher.depth:
        pass
    waiting = submit(batcher, "2", "3", "4")
    assert waiting[0].cancel()
    bank.go.set()
    batcher.close()
    assert answers(first + waiting[1:]) == [11, 13, 14]
    assert "2" not in [task for batch in bank.batches for task in batch]


def test_numbers_out_of_range():
    for wrong in ({"max_batch": 0}, {"max_wait": -1}):
        with pytest.raises(ValueError, match="max_batch must be at least 1"):
            Batcher(Held(), **wrong)
