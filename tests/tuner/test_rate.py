# SPDX-License-Identifier: Apache-2.0
"""A rate in the loss: the masks' entropy, its gradient against autograd, and smaller files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.functional.masking import MaskSpec, code_length, straight_through
from smn_peft.training import run
from smn_peft.training.metrics import read_metrics
from tests.training.helpers import Batches, supervised_task
from tests.training.tiny import tiny_arguments


def drawn(shape, off: float, dtype=torch.float64) -> torch.Tensor:
    """Scores around a start of 1, of which a share lies below 0."""
    generator = torch.Generator().manual_seed(0)
    scores = 1 + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < off, scores - 2, scores).to(dtype)


@pytest.mark.parametrize("off", [0.01, 0.2])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bits_and_gradient_are_those_of_the_formula(off, share, dtype):
    scores = drawn((60, 70), off, dtype).requires_grad_()
    trainable = None if share == 1 else torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < share
    chosen = torch.ones_like(scores, dtype=torch.bool) if trainable is None else trainable
    mask = straight_through(scores.clamp(max=1.0), MaskSpec(), torch.float64)[
        chosen
    ]  # autograd's: none above the start
    p = 1 - mask.mean()
    expected = -mask.numel() * (p * torch.log2(p) + (1 - p) * torch.log2(1 - p))
    (wanted,) = torch.autograd.grad(3 * expected, scores)
    bits = code_length(scores, trainable=trainable)
    (found,) = torch.autograd.grad(3 * bits, scores)
    assert bits.dtype == torch.float64
    torch.testing.assert_close(bits, expected)
    wanted = torch.where(scores == 1.0, 0.0, wanted)  # a tie with the start: autograd's clamp lets the gradient pass
    torch.testing.assert_close(found, wanted)
    assert found.dtype == dtype
    assert set(np.unique(found.sign().float())) == {-1.0, 0.0}


@pytest.mark.parametrize("shape", [(700, 500), (90, 20, 10, 10), (3, 200_000)])
@pytest.mark.parametrize("fraction", [None, 0.4])
def test_a_tensor_that_no_cache_holds_is_counted_whole(shape, fraction):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(shape, generator=generator) - 0.1
    scores = scores.to(memory_format=torch.channels_last) if len(shape) == 4 else scores
    trainable = None if fraction is None else torch.rand(shape, generator=generator) < fraction
    off = scores <= 0 if trainable is None else (scores <= 0) & trainable
    weights = scores.numel() if trainable is None else int(trainable.sum())
    p = int(off.sum()) / weights
    expected = -weights * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert float(code_length(scores, trainable=trainable)) == pytest.approx(expected, rel=1e-9)


def test_what_nothing_and_too_much_off_cost():
    scores = torch.full((8, 8), 1.0, requires_grad=True)
    assert code_length(scores).item() == 0
    (gradient,) = torch.autograd.grad(code_length(scores), scores)
    assert not gradient.any()
    with torch.no_grad():
        scores[0, 0] = 0.5  # on, and on its way: the first flip would cost log2(2N − 1) bits more
    (gradient,) = torch.autograd.grad(code_length(scores), scores)
    assert gradient.flatten().tolist() == pytest.approx([float(np.log2(0.5 / 64))] + [0.0] * 63)
    most = torch.where(torch.arange(64) < 60, -1.0, 1.0).requires_grad_()
    (gradient,) = torch.autograd.grad(code_length(most), most)
    assert not gradient.any(), "more are switched off because most are"


def masked(rate: float, **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 4))
    return get_peft_model(net, MaskConfig(target_modules=["0", "2"], rate=rate, **options))


def test_rate_of_a_model():
    model = masked(0.3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.copy_(drawn(parameter.shape, 0.2, torch.float32))
    entropy = sum(code_length(p.double()).item() for p in model.parameters() if p.requires_grad) / (12 * 30 + 30 * 4)
    assert 0.3 < entropy < 1
    assert model.bits_per_weight() == pytest.approx(entropy)
    assert model.rate().item() == pytest.approx(0.3 * entropy)
    assert masked(0.0).rate() is None
    model.add_adapter("other", MaskConfig(target_modules=["0"]))
    model.set_adapter("other")
    assert model.rate() is None
    model.set_adapter("default", inference_mode=True)
    assert model.rate() is None


def test_a_task_adds_it_once():
    task, batch = supervised_task(batch_norm="frozen").train(), next(iter(Batches()))
    scores = [parameter for _, parameter, is_score in task.trainable() if is_score]
    for parameter in scores:
        parameter.data.copy_(drawn(parameter.shape, 0.1, torch.float32))
    torch.manual_seed(3)  # of the stochastic depth
    plain = task(batch)
    gradients = torch.autograd.grad(plain["loss"], scores)
    task.mask_config.rate = 0.7
    torch.manual_seed(3)
    found = task(batch)
    rate = task.model.rate()
    torch.testing.assert_close(found["loss"], plain["loss"] + rate)
    torch.testing.assert_close(found["rate"], rate.detach())
    pulls = torch.autograd.grad(rate, scores)
    for gradient, own, pull in zip(torch.autograd.grad(found["loss"], scores), gradients, pulls, strict=True):
        torch.testing.assert_close(gradient, own + pull)


def test_files_become_smaller(tmp_path):
    plain = tiny_arguments(tmp_path, epochs=4, optimizer="adamw", lr=0.3, mask={"codec": "entropy"})
    rated = replace(plain, mask=replace(plain.mask, rate=3.0), output_dir=str(tmp_path / "rated"))
    sizes, bits = [], []
    for arguments in (plain, rated):
        sizes.append(run(arguments, evaluate=False).sizes["mask"])
        lines = [line for line in read_metrics(f"{arguments.output_dir}/metrics.jsonl") if "loss" in line]
        bits.append(lines[-1]["bits_per_weight"])
        assert ("rate" in lines[-1]) == (arguments is rated)
    assert sizes[1] < 0.6 * sizes[0]
    assert 0 < bits[1] < 0.6 * bits[0]


@pytest.mark.parametrize(
    "options",
    [
        {"mask_type": "topk", "density": 0.5},
        {"init_score": "kaiming_uniform"},
        {"init_score": -1.0},
    ],
)
def test_where_there_is_no_start_to_go_back_to(options):
    with pytest.raises(ValueError, match=r"rate=0\.1 pulls scores back to where they started: it needs mask_type="):
        MaskConfig(rate=0.1, **options)
    with pytest.raises(ValueError, match="rate must be at least 0"):
        MaskConfig(rate=-1.0)
