# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps for its training forwards: whatever changes it, the next forward and its gradients are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from smn_peft.tuner.cache import Training

from .cases import BY_NAME, layer_of, masked_model

NAMES = ("linear", "conv2d")


def ready(name: str, **options) -> tuple[PeftModel, torch.Tensor]:
    """A model with two adapters that has trained, and an input."""
    case = BY_NAME[name]
    model = masked_model(case, case.random(1, **options), "first")
    model.add_adapter("second", case.random(2, **options))
    x = case.inputs()
    model(x).square().sum().backward()
    assert isinstance(layer_of(model)._ready, Training)
    model.zero_grad()
    return model, x


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradient of everything that has one."""
    model.zero_grad()
    out = model(x)
    if out.requires_grad:
        out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **found}


def scores_of(model: PeftModel, adapter: str = "first") -> nn.Parameter:
    layer = layer_of(model)
    return layer.scores(layer.present_slots[0])[adapter]


def replace_scores(model: PeftModel) -> None:
    layer = layer_of(model)
    layer.scores(layer.present_slots[0])["first"] = nn.Parameter(scores_of(model).detach().neg())


def replace_weight(model: PeftModel) -> None:
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach() * 2, requires_grad=False)


def replace_bias(model: PeftModel) -> None:
    base = layer_of(model).base_layer
    base.bias = nn.Parameter(base.bias.detach() + 1, requires_grad=False)


def replace_base(model: PeftModel) -> None:
    layer = layer_of(model)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        layer.base_layer.weight.mul_(3)


def move_threshold(model: PeftModel) -> None:
    info = layer_of(model).smn_info["first"]
    info.spec = replace(info.spec, threshold=0.2)


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "scores written": lambda model: scores_of(model).data.neg_(),
    "scores replaced": replace_scores,
    "scores frozen": lambda model: scores_of(model).requires_grad_(False),
    "weight written": lambda model: layer_of(model).base_layer.weight.data.neg_(),
    "weight replaced": replace_weight,
    "weight trains": lambda model: layer_of(model).base_layer.weight.requires_grad_(),
    "bias replaced": replace_bias,
    "base replaced": replace_base,
    "threshold moved": move_threshold,
    "another adapter": lambda model: model.set_adapter("second"),
    "both adapters": lambda model: model.base_model.set_adapter(["first", "second"]),
    "the same list, longer": lambda model: layer_of(model).set_adapter(["first", "second"]),
    "adapters disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "deleted": lambda model: model.delete_adapter("first"),
    "wider": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_seen(name, change):
    model, x = ready(name)
    before = outcome(model, x)
    assert isinstance(layer_of(model)._ready, Training)
    with torch.no_grad():
        change(model)
    x = x.to(layer_of(model).get_base_layer().weight.dtype)
    fresh = copy.deepcopy(model)
    assert layer_of(fresh)._ready is None
    expected, actual = outcome(fresh, x), outcome(model, x)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    same = before.keys() == actual.keys()
    assert not same or any(not torch.equal(before[key].to(value.dtype), value) for key, value in actual.items())


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_is_kept(name):
    model, x = ready(name)
    with torch.no_grad():
        first, second = model(x), model(x)
    assert not isinstance(layer_of(model)._ready, Training)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model(x).detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_leaves_nothing_behind(name):
    model, x = ready(name)
    names = ["second", "first"] * (len(x) // 2) + ["second"] * (len(x) % 2)
    model.set_adapter("second")
    model(x, adapter_names=names)
    expected = outcome(copy.deepcopy(model), x)
    actual = outcome(model, x)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_bias_is_made_anew_every_time(name):
    model, x = ready_with_bias(name)
    before = outcome(model, x)
    with torch.no_grad():
        layer = layer_of(model)
        layer.scores(layer.present_slots[1])["first"].neg_()
    actual = outcome(model, x)
    assert not torch.equal(before["out"], actual["out"])
    assert all(torch.equal(actual[key], value) for key, value in outcome(copy.deepcopy(model), x).items())


def ready_with_bias(name: str) -> tuple[PeftModel, torch.Tensor]:
    case = BY_NAME[name]
    model = masked_model(case, case.random(1, mask_bias=True), "first")
    x = case.inputs()
    model(x).square().sum().backward()
    assert layer_of(model)._ready is None
    return model, x
