# SPDX-License-Identifier: Apache-2.0
"""A wrapper answers for its layer: sizes and strides as they are, tensors as the layer computes with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from peft import get_peft_model
from torch import nn

from smn_peft import MaskConfig

from .cases import CASES, layer_of, masked_model
from .nets import TwoNorms

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_all_that_a_layer_has(case):
    layer, base = layer_of(masked_model(case, case.random())), case.base().body
    public = [name for name in vars(base) if not name.startswith("_") and name != "training"]
    assert public
    for name in public:
        assert getattr(layer, name) == getattr(base, name), name
    assert (layer.in_features, layer.out_features) if hasattr(base, "weight") and base.weight.dim() > 1 else True
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = layer.nothing_of_the_kind
    assert not hasattr(layer, "_hf_hook")
    assert type(copy.deepcopy(layer)) is type(layer) is type(pickle.loads(pickle.dumps(layer)))


@every_case
@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
def test_tensors_are_those_in_use(case, packed):
    model = masked_model(case, case.random(inference_mode=packed))
    layer = layer_of(model)
    own = {path: layer.base_layer.get_parameter(path).clone() for path in case.weights}

    def read(path: str) -> torch.Tensor:
        found = layer
        for part in path.split("."):
            found = getattr(found, part)
        return found

    for path, weight in own.items():
        slot = next(slot for slot in layer.present_slots if slot.path == path)
        mask = layer.mask("default", slot)
        sigma = mask.double().mean().sqrt() if layer.smn_info["default"].spec.scale else 1.0
        expected = (weight.double() * mask / sigma).to(weight.dtype)
        torch.testing.assert_close(read(path), expected, **case.tolerance)
        with model.disable_adapter():
            assert torch.equal(read(path), weight)


def test_a_property_that_fails_gives_no_other_answer(monkeypatch):
    case = CASES[0]
    layer = layer_of(masked_model(case, case.random()))
    monkeypatch.setattr(layer, "effective", lambda *args: [].nothing)
    with pytest.raises(AttributeError):
        _ = layer.weight


def test_statistics_are_the_active_adapter_s():
    model = get_peft_model(TwoNorms(), MaskConfig(target_modules=["enc.0"], batch_norm="adapt"))
    norm, base = model.get_base_model().enc[1], TwoNorms().enc[1]
    model.train()(torch.randn(4, 3, 8, 8))
    assert norm.running_mean is norm.smn_running_mean["default"]
    assert not torch.equal(norm.running_var, base.running_var)
    assert int(norm.num_batches_tracked) == 1
    with model.disable_adapter():
        assert torch.equal(norm.running_mean, base.running_mean)
    model.merge_adapter()
    assert torch.equal(norm.running_mean, norm.smn_running_mean["default"])


@pytest.mark.parametrize(
    ("name", "batch_norm"), [("mobileone_s0", "adapt"), ("ghostnetv2_100", "frozen"), ("levit_128s", "adapt")]
)
def test_a_model_that_timm_reparameterizes(name, batch_norm):
    torch.manual_seed(0)
    size = 224 if name.startswith("levit") else 64
    base = timm.create_model(name, num_classes=5)
    model = get_peft_model(base, MaskConfig(init_weights=False, batch_norm=batch_norm)).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        if batch_norm == "adapt":
            model.train()(x)
            model.eval()
        expected = model(x)
        folded = timm.utils.reparameterize_model(model)
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(x), expected)
    assert len(list(folded.modules())) < len(list(model.modules()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) or name.startswith("ghost")
