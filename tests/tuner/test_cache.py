# SPDX-License-Identifier: Apache-2.0
"""The effective weight: cached or not, whatever changes it, the next forward uses the new one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .cases import BY_NAME, layer_of, masked_model, train

CASE = BY_NAME["conv2d-bias"]
X = CASE.inputs()

pytestmark = pytest.mark.filterwarnings("ignore:.*saved as bits", "ignore:Could not find a config file")


def uncached(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """The output of a copy that has nothing cached."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return twin(x)


def filled(**options) -> tuple[PeftModel, torch.Tensor]:
    """A model with two adapters that has run, its cache filled if they are bits, and its output."""
    model = masked_model(CASE, CASE.random(1, **options), "first")
    model.add_adapter("second", CASE.random(2, **options))
    with torch.no_grad():
        model(X)
        before = model(X)
    return model, before


def check(model: nn.Module, before: torch.Tensor, x: torch.Tensor = X, changes: bool = True) -> None:
    """The output is that of an uncached model, and not the old one."""
    with torch.no_grad():
        after = model(x)
    assert torch.equal(after, uncached(model, x))
    assert torch.equal(after.float(), before.float()) != changes


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 50.0, foreach=True),
        lambda p: torch.optim.SGD(p, 50.0, momentum=0.9, foreach=False),
        lambda p: torch.optim.SGD(p, 50.0, fused=True),
        lambda p: torch.optim.Adam(p, 1.0, fused=True),
        lambda p: torch.optim.AdamW(p, 1.0),
    ],
    ids=["sgd-foreach", "sgd-loop", "sgd-fused", "adam-fused", "adamw"],
)
def test_an_optimizer_step(make):
    model, before = filled()
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(X).square().sum().backward()
    with torch.no_grad():
        assert torch.equal(model(X), before)
    optimizer.step()
    check(model, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores.data.copy_(-scores.data),  # as averages of weights are swapped in
        lambda scores: np.negative(scores.detach().numpy(), out=scores.detach().numpy()),  # as a CUDA graph's replay
    ],
    ids=["data", "memory"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_scores_that_change_with_no_version_moved(change, frozen):
    model, before = filled()
    scores = layer_of(model).scores(layer_of(model).present_slots[0])["first"].requires_grad_(not frozen)
    with torch.no_grad():
        assert torch.equal(model(X), before)
    change(scores)
    check(model, before)


def test_a_base_weight_that_trains_and_changes_with_no_version_moved():
    model, _ = filled(inference_mode=True)
    weight = layer_of(model).base_layer.weight.requires_grad_()
    with torch.no_grad():
        before = model(X)
    weight.data.mul_(2)
    check(model, before)


def test_training_between_two_evaluations():
    model, before = filled()
    train(model, X)
    check(model, before)


def write(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).scores(layer_of(model).present_slots[0])["first"].neg_()


def write_bias(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).scores(layer_of(model).present_slots[1])["first"].neg_()


def edit_base(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).base_layer.weight.mul_(2)


def replace_base(model: PeftModel) -> None:
    layer_of(model).base_layer.weight = nn.Parameter(layer_of(model).base_layer.weight.detach() * 2)


def move_base_data(model: PeftModel) -> None:
    layer_of(model).base_layer.weight.data = layer_of(model).base_layer.weight.detach() * 2


def load_other_state(model: PeftModel) -> None:
    other = masked_model(CASE, CASE.random(8), "first")
    other.add_adapter("second", CASE.random(9))
    model.load_state_dict(other.state_dict())


def set_adapter_state(model: PeftModel) -> None:
    other = masked_model(CASE, CASE.random(8), "first")
    set_peft_model_state_dict(model, get_peft_model_state_dict(other, adapter_name="first"), adapter_name="first")


def activate_both(model: PeftModel) -> None:
    model.base_model.set_adapter(["first", "second"])


def delete_active(model: PeftModel) -> None:
    model.delete_adapter("first")


def set_mask(model: PeftModel) -> None:
    layer = layer_of(model)
    slot = layer.present_slots[0]
    layer.set_mask("first", slot, ~layer.mask("first", slot))


def switch(model: PeftModel) -> None:
    model.set_adapter("second")


def widen(model: PeftModel) -> None:
    model.double()


def narrow(model: PeftModel) -> None:
    model.to(torch.bfloat16)


OF_SCORES = [write, write_bias, load_other_state]
OF_BOTH = [
    edit_base,
    replace_base,
    move_base_data,
    set_adapter_state,
    activate_both,
    delete_active,
    set_mask,
    switch,
    widen,
    narrow,
]
MUTATIONS = [(mutate, False) for mutate in OF_SCORES + OF_BOTH] + [(mutate, True) for mutate in OF_BOTH]
# A graph keeps the effective weight of packed bits: an edit of the base under it asks for a new compile.
COMPILED = [
    pair for pair in MUTATIONS if pair not in ((edit_base, True), (move_base_data, True), (replace_base, True))
]


def label(value: object) -> str:
    return {True: "packed", False: "scores"}.get(value) or value.__name__


@pytest.mark.parametrize(("mutate", "packed"), MUTATIONS, ids=label)
@pytest.mark.filterwarnings("ignore:Adapter first was active which is now deleted")
def test_a_mutation(mutate: Callable[[PeftModel], None], packed):
    model, before = filled(inference_mode=packed)
    mutate(model)
    check(model, before, X.to(layer_of(model).base_layer.weight.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("mutate", "packed"), COMPILED, ids=label)
@pytest.mark.filterwarnings("ignore:Adapter first was active which is now deleted")
def test_a_mutation_under_compile(mutate: Callable[[PeftModel], None], packed):
    model, before = filled(inference_mode=packed)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), before)
        mutate(model)
        x = X.to(layer_of(model).base_layer.weight.dtype)
        after = compiled(x)
    assert torch.equal(after, uncached(model, x))
    assert not torch.equal(after.float(), before)


def test_loading_over_an_adapter_of_the_same_name(tmp_path):
    other = masked_model(CASE, CASE.random(8))
    other.save_pretrained(tmp_path)
    for packed in (False, True):
        model, before = filled(inference_mode=packed)
        model.load_adapter(tmp_path, "first")
        check(model, before)
        with torch.no_grad():
            assert torch.equal(model(X), other(X))


def test_loading_a_new_adapter_leaves_the_active_one(tmp_path):
    masked_model(CASE, CASE.random(8)).save_pretrained(tmp_path)
    model, before = filled(inference_mode=True)
    model.load_adapter(tmp_path, "third")
    check(model, before, changes=False)
    model.set_adapter("third")
    check(model, before)


@pytest.mark.parametrize("packed", [False, True])
def test_merging_and_unmerging(packed):
    model, before = filled(inference_mode=packed)
    model.merge_adapter(["second"])
    with torch.no_grad():
        merged = model(X)
    model.unmerge_adapter()
    check(model, before, changes=False)
    model.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(model(X), merged)
    assert not torch.equal(merged, before)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_written_while_merged(packed):
    model, before = filled(inference_mode=packed)
    model.merge_adapter()
    set_mask(model)
    model.unmerge_adapter()
    check(model, before)


def test_disabling_in_between():
    model, before = filled()
    with model.disable_adapter(), torch.no_grad():
        assert not torch.equal(model(X), before)
        write(model)
    check(model, before)


def test_a_change_of_density():
    options = {"mask_type": "topk", "density": 0.2, "init_score": "kaiming_uniform", "density_schedule": "linear"}
    model = masked_model(CASE, CASE.config(**options))
    with torch.no_grad():
        before = model(X)
    model.base_model.update_density(0.5)
    check(model, before)
    assert model.base_model.density() == pytest.approx(0.6, abs=0.02)


def test_a_mixed_batch_leaves_the_active_adapters_weights_cached(monkeypatch):
    model, before = filled(inference_mode=True)
    with torch.no_grad():
        for names in (["second"] * len(X), ["first"] + ["second"] * (len(X) - 1)):
            model(X, adapter_names=names)
        monkeypatch.setattr(layer_of(model), "_computed", lambda *args: pytest.fail("built again"))
        assert torch.equal(model(X), before)


def test_a_copy_has_a_cache_of_its_own():
    model, before = filled(inference_mode=True)
    twin = copy.deepcopy(model)
    set_mask(twin)
    check(twin, before)
    check(model, before, changes=False)


def test_the_cache_is_used_and_costs_no_second_build(monkeypatch):
    model, before = filled(inference_mode=True)
    layer = layer_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_computed", lambda *args: pytest.fail("the effective weight was built again"))
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(model(X), before)
    layer._active_adapter = ["second"]  # behind the back of set_adapter
    check(model, before)
    layer._active_adapter = ["first"]
    layer.base_layer = copy.deepcopy(layer.base_layer)
    edit_base(model)
    check(model, before)


def test_a_settled_layer_that_trains_again_gives_gradients():
    model, _ = filled()
    model(X).square().sum().backward()
    scores = layer_of(model).scores(layer_of(model).present_slots[0])["first"]
    assert scores.grad is not None
    assert scores.grad.any()
