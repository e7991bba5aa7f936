# SPDX-License-Identifier: Apache-2.0
"""Masks of exactly two of every four inputs' weights: the pattern, its start, its gradient, its file, its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smn_peft import MaskConfig
from smn_peft.functional.masking import two_of_four_mask
from smn_peft.storage.adapter_file import adapter_sizes

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:Unable to fetch remote file")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 5)
    return nn.Sequential(*layers).requires_grad_(False)


def masked(**options) -> PeftModel:
    return get_peft_model(net(), MaskConfig(target_modules=["0", "3"], granularity="2:4", **options))


def test_the_pattern_is_that_of_a_loop_in_numpy():
    for seed, shape in enumerate([(3, 8), (5, 4, 3, 3), (1, 4), (2, 400)]):
        scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
        expected = np.zeros(scores.numel(), bool)
        flat = scores.flatten().numpy()
        for start in range(0, len(flat), 4):
            best = sorted(range(4), key=lambda i: (-flat[start + i], i))[:2]
            expected[[start + i for i in best]] = True
        assert np.array_equal(two_of_four_mask(scores).flatten().numpy(), expected)
    with pytest.raises(ValueError, match=r"rows of a multiple of four weights, got scores \(3, 6\)"):
        two_of_four_mask(torch.zeros(3, 6))


def test_it_starts_from_the_largest_weights_and_trains_straight_through():
    model, images = masked(), torch.randn(6, 4, 5, 5)
    base = net()
    for name, mask in model.masks().items():
        weight = base.get_parameter(name.removeprefix("model."))
        assert torch.equal(mask, two_of_four_mask(weight.abs()))
        assert mask.float().mean() == 0.5
    loss = model(images).square().sum()
    loss.backward()
    linear = model.base_model.model[3]
    scores, weight = linear.smn_scores["default"], linear.base_layer.weight
    hidden = F.relu(F.conv2d(images, base[0].weight * 2**0.5 * two_of_four_mask(base[0].weight.abs()), base[0].bias))
    mask = two_of_four_mask(weight.abs()).float().requires_grad_()
    out = F.linear(hidden.flatten(1), weight * mask / mask.mean().sqrt(), linear.base_layer.bias)
    last = model.base_model.model[5]
    (wanted,) = torch.autograd.grad(F.linear(F.relu(out), last.weight, last.bias).square().sum(), mask)
    torch.testing.assert_close(scores.grad, wanted)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.masks()
    for _ in range(5):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    after = model.masks()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in after.values())


@pytest.mark.parametrize("codec", ["bits", "entropy"])
def test_it_is_saved_loaded_and_merged_like_any_other(tmp_path, codec):
    model, images = masked(codec=codec).eval(), torch.randn(3, 4, 5, 5)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = model(images)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(loaded(images), expected)
    assert torch.equal(loaded.merge_and_unload()(images), expected)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert all(torch.equal(mask, model.masks()[name]) for name, mask in again.masks().items())


def test_a_coded_file_is_near_the_entropy_of_the_pattern(tmp_path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(512, 1024)), MaskConfig(target_modules=["0"], granularity="2:4", codec="entropy")
    )
    scores = next(p for name, p in model.named_parameters() if "smn_scores" in name)
    scores.data.uniform_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert np.log2(6) / 4 <= 8 * adapter_sizes(tmp_path).mask / scores.numel() <= 1.01 * np.log2(6) / 4


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(6, 8), r"Target '0' \(Linear, weight \(8, 6\)\) has no multiple of four inputs"),
        (nn.Conv2d(3, 8, 3), r"Target '0' \(Conv2d, weight \(8, 3, 3, 3\)\) has no multiple of four inputs"),
        (nn.ConvTranspose2d(4, 8, 3), r"\(ConvTranspose2d, .* does not hold its weights output by output"),
        (nn.Embedding(8, 8), r"\(Embedding, .* does not hold its weights output by output"),
        (Conv1D(8, 8), r"\(Conv1D, .* does not hold its weights output by output.* leave it out by exclude_modules"),
    ],
)
def test_layers_that_cannot_take_it(layer, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MaskConfig(target_modules=["0"], granularity="2:4"))
    assert type(model[0]) is type(layer)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_type": "topk", "density": 0.5},
        {"trainable_fraction": 0.5},
        {"mask_bias": True},
        {"rate": 1.0},
        {"init_score": "kaiming_uniform"},
    ],
)
def test_options_that_do_not_go_with_it(options):
    with pytest.raises(
        ValueError, match=r"granularity='2:4' (needs mask_type, |ranks the weights of every four: leave rate)"
    ):
        MaskConfig(granularity="2:4", **options)
