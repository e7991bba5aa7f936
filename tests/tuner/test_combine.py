# SPDX-License-Identifier: Apache-2.0
"""Votes over masks: what counts as a majority, and that the new adapter stands on its own."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from smn_peft import MaskConfig
from smn_peft.tuner.model import COMBINATIONS, combine_masks

from .cases import BY_NAME, mask_bits, masked_model
from .nets import TwoNorms

BITS = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("rows", "weights", "kind", "expected"),
    [
        ((0, 1, 2), (1, 1, 1), "union", [1, 1, 1, 0]),
        ((0, 1, 2), (1, 1, 1), "intersection", [1, 0, 0, 0]),
        ((0, 1, 2), (1, 1, 1), "majority", [1, 1, 0, 0]),
        ((0, 2), (1, 1), "majority", [1, 0, 0, 0]),  # half is not more than half
        ((0, 1, 2), (2, 1, 1), "majority", [1, 1, 0, 0]),
        ((0, 1, 2), (3, 1, 1), "majority", [1, 1, 1, 0]),
        ((0, 1, 2), (0, 0, 5), "majority", [1, 0, 0, 0]),
        ((1,), (0.1,), "majority", [1, 1, 0, 0]),
    ],
)
def test_votes(rows, weights, kind, expected):
    combined = combine_masks(BITS[list(rows)], weights, kind)
    assert combined.dtype == torch.bool
    assert combined.int().tolist() == expected


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_the_parts_can_go_and_the_combination_stays(kind):
    case = BY_NAME["conv2d-bias"]
    model = masked_model(case, case.random(1), "one")
    model.add_adapter("two", case.random(2))
    model.base_model.add_weighted_adapter(["one", "two"], adapter_name="both", combination_type=kind)
    assert not any("both" in name for name, _ in model.named_parameters())  # bits only, for inference
    assert model.active_adapters == ["one"]
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "scores.one" in name)
    masks = mask_bits(model, "both")
    model.set_adapter("both")
    with torch.no_grad():
        expected = model(case.inputs())
        model.delete_adapter("one")
        model.delete_adapter("two")
        assert torch.equal(model(case.inputs()), expected)
    assert all(torch.equal(mask, masks[path]) for path, mask in mask_bits(model, "both").items())


def test_combining_adapters_for_inference_and_training_alike(tmp_path):
    case = BY_NAME["linear"]
    model = masked_model(case, case.random(1), "scores")
    model.add_adapter("packed", case.random(2, inference_mode=True))
    model.base_model.add_weighted_adapter(["scores", "packed"], adapter_name="both", combination_type="intersection")
    expected = mask_bits(model, "scores")["weight"] & mask_bits(model, "packed")["weight"]
    assert torch.equal(mask_bits(model, "both")["weight"], expected)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def two(first: dict, second: dict):
    """A model with two adapters on one convolution, the second trained for a while."""
    options = {"target_modules": ["enc.0"], "init_weights": False}
    model = get_peft_model(TwoNorms(), MaskConfig(**options, **first), adapter_name="one")
    model.add_adapter("two", MaskConfig(**options, **second))
    model.set_adapter("two")
    model.train()
    for _ in range(3):
        model(X)
    return model.eval()


def test_heads_do_not_combine_but_one_comes_along():
    saved = {"modules_to_save": ["head"]}
    model = two(saved, saved)
    with pytest.raises(ValueError, match=r"modules_to_save, but found 1 such instance.*Combine adapters without"):
        model.add_weighted_adapter(["one", "two"], adapter_name="both")
    assert list(model.peft_config) == ["one", "two"]
    model = two({}, saved)
    torch.nn.init.ones_(model.base_model.model.head.modules_to_save["two"][2].weight)
    with torch.no_grad():
        expected = model(X)
        model.add_weighted_adapter(["one", "two"], [0.0, 1.0], adapter_name="both")
        model.set_adapter("both")
        torch.testing.assert_close(model.eval()(X), expected)


@pytest.mark.parametrize("policies", [("adapt", "frozen"), ("frozen", "adapt")], ids="-".join)
@pytest.mark.parametrize("chosen", [0, 1])
def test_batch_norm_policies_combine(policies, chosen):
    model = two(*({"batch_norm": policy} for policy in policies))
    weights = [0.0, 0.0]
    weights[chosen] = 1.0
    model.add_weighted_adapter(["one", "two"], weights, adapter_name="both")
    with torch.no_grad():
        outputs = []
        for name in (("one", "two")[chosen], "both"):
            model.set_adapter(name)
            outputs.append(model.eval()(X))
    assert torch.equal(*outputs)


def test_a_combination_that_fails_leaves_nothing():
    model = two({}, {})
    model.base_model.model.enc[0].smn_scores["two"].data = torch.zeros(7)  # of no shape that could be combined
    with pytest.raises(RuntimeError):
        model.add_weighted_adapter(["one", "two"], adapter_name="both")
    assert list(model.peft_config) == ["one", "two"]
    assert not any("both" in name for name, _ in model.named_buffers())
