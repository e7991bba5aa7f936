# SPDX-License-Identifier: Apache-2.0
"""Scores in bf16: torch's steps, rounded right on average; resumed to the bit; fp32 again at the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smn_peft.functional.effective import ConvGeometry, masked_conv, masked_linear
from smn_peft.functional.masking import MaskSpec
from smn_peft.training import Interrupted, Trainer, TrainingTask
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.task import NarrowAdamW, NarrowSGD

from .helpers import Batches, loop, resnet, stop_after, supervised_task

SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1}
OPTIMIZERS = {
    "sgd": (NarrowSGD, torch.optim.SGD, SGD),
    "plain": (NarrowSGD, torch.optim.SGD, {"lr": 0.3}),
    "nesterov": (NarrowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (NarrowAdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


def steps(optimizer, parameter, count=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_fp32_is_stepped_as_by_torch(name):
    narrow, wide, options = OPTIMIZERS[name]
    one, two = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
    assert torch.equal(steps(narrow([one], **options), one), steps(wide([two], **options), two))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torch_s_on_the_same_numbers_rounded_to_a_neighbour(name):
    narrow, wide, options = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.linspace(-1, 1, 240).bfloat16())
    optimizer = narrow([parameter], **options)
    steps(optimizer, parameter)
    state = optimizer.state[parameter]
    assert all(value.dtype == torch.bfloat16 for value in state.values() if value.ndim)
    reference = nn.Parameter(parameter.detach().float())
    twin = wide([reference], **options)
    twin.state[reference] = {key: value.clone().float() for key, value in state.items()}
    for one, other in ((parameter, optimizer), (reference, twin)):
        one.grad = torch.linspace(-0.5, 2, 240).bfloat16().to(one.dtype)
        other.step()
    pairs = [(parameter, reference)] + [(state[key], twin.state[reference][key]) for key in state]
    for got, exact in pairs:
        gap = 2.0**-7 * exact.detach().abs() + 1e-38  # of two neighbours in bf16
        assert ((got.float() - exact).abs() <= gap).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_too_small_for_bf16_add_up(name):
    narrow, _, _ = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    rate = 1e-4 if name == "sgd" else 1e-3
    optimizer = narrow([parameter], lr=rate, **({"weight_decay": 0.0} if name == "adamw" else {}))
    for _ in range(100):
        parameter.grad = torch.full_like(parameter, 10.0 if name == "sgd" else 1.0)
        optimizer.step()
    assert parameter.detach().double().mean().item() == pytest.approx(0.9, abs=0.002)  # to the nearest it stays 1


def test_what_is_drawn_does_not_depend_on_the_process_but_on_seed_and_step():
    def after(global_seed, rounding_seed):
        torch.manual_seed(global_seed)
        parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        return steps(NarrowSGD([{"params": [parameter], "rounding_seed": rounding_seed}], lr=1e-3), parameter)

    assert torch.equal(after(0, 3), after(1, 3))
    assert not torch.equal(after(0, 3), after(0, 4))


@pytest.mark.parametrize("scale_gradient", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_those_of_fp32_rounded_once(kind, scale_gradient):
    torch.manual_seed(0)
    weight = torch.randn(6, 5) if kind == "linear" else torch.randn(6, 5, 3, 3)
    x = torch.randn(3, 5) if kind == "linear" else torch.randn(3, 5, 8, 8)
    spec, geometry = MaskSpec(scale_gradient=scale_gradient), ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        scores = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
        scores.requires_grad_()
        if kind == "linear":
            out = masked_linear(x, weight, scores, spec=spec)
        else:
            out = masked_conv(x, weight, scores, None, geometry, spec)
        out.square().sum().backward()
        grads.append(scores.grad)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=2**-8, atol=0)


def scores_of(task: TrainingTask) -> list[torch.Tensor]:
    return [parameter for _, parameter, is_scores in task.trainable() if is_scores]


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "lr": 0.05, "accumulate": 2}], ids=["sgd", "adamw"])
def test_a_run_learns_resumes_to_the_bit_and_ends_in_fp32(tmp_path, options):
    options = {"score_dtype": "bfloat16", "epochs": 4, **options}
    whole = Trainer(supervised_task(), Batches(), loop(tmp_path / "whole", **options))
    assert {scores.dtype for scores in scores_of(whole.task)} == {torch.bfloat16}
    lines = [line["loss"] for line in whole.train()]
    assert lines[-1] < 0.7 * lines[0]
    assert {scores.dtype for scores in scores_of(whole.task)} == {torch.float32}
    assert all(torch.equal(scores, scores.bfloat16().float()) for scores in scores_of(whole.task))
    momentum = [s for p in scores_of(whole.task) for s in whole.optimizer.state[p].values() if s.ndim]
    assert {tensor.dtype for tensor in momentum} == {torch.bfloat16}
    part = Trainer(supervised_task(), Batches(), loop(tmp_path / "part", **options))
    stop_after(part, 5)
    with pytest.raises(Interrupted):
        part.train()
    torch.manual_seed(99)
    rest = Trainer(supervised_task(), Batches(), loop(tmp_path / "part", resume=True, **options))
    rest.train()
    for one, two in zip(scores_of(whole.task), scores_of(rest.task), strict=True):
        assert torch.equal(one, two)
    assert list_checkpoints(tmp_path / "part")


def test_it_is_of_masks_only(tmp_path):
    from smn_peft.backbones import Classifier
    from smn_peft.objectives import create_objective

    task = TrainingTask(Classifier(resnet(), 16, 3), create_objective("cross_entropy", feature_dim=16, num_classes=3))
    with pytest.raises(ValueError, match="score_dtype='bfloat16' is of a mask's scores"):
        Trainer(task, Batches(), loop(tmp_path, score_dtype="bfloat16"))
    with pytest.raises(ValueError, match="score_dtype must be one of float32, bfloat16"):
        loop(tmp_path, score_dtype="float16")
