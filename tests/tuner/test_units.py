# SPDX-License-Identifier: Apache-2.0
"""One score for all weights of a row or column: masks, gradients against autograd, files, merging, refusals."""

from __future__ import annotations

import re
from functools import partial

import pytest
import timm
import torch
import torchvision
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from smn_peft import MaskConfig, explain_targets
from smn_peft.storage.files import AdapterFileError

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:Unable to fetch remote file")

KINDS = ["row", "column", "row+weight", "column+weight"]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 5)
    return nn.Sequential(*layers).requires_grad_(False)


def masked(granularity: str, **options) -> PeftModel:
    """A model whose scores were drawn: a third of them off."""
    model = get_peft_model(net(), MaskConfig(target_modules=["0", "3"], granularity=granularity, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 3 - 1)
    return model


def scores_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def images() -> torch.Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_a_tensor_is_that_of_its_units_and_weights(kind):
    model = masked(kind)
    scores, masks = scores_of(model), model.masks()
    for layer in ("0", "3"):
        prefix = f"base_model.model.{layer}.smn_"
        units = scores[f"{prefix}unit_scores"] > 0
        wanted = units.expand_as(net().get_parameter(f"{layer}.weight"))
        if "weight" in kind:
            wanted = wanted & (scores[f"{prefix}scores"] > 0)
        assert torch.equal(masks[f"{layer}.weight"], wanted)
        assert 0 < wanted.float().mean() < 1
        if kind.startswith("row"):  # the bias goes with its row
            assert torch.equal(masks[f"{layer}.bias"], units.flatten())
        else:
            assert f"{layer}.bias" not in masks
    assert len(scores) == (4 if "weight" in kind else 2)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_through_one_number_per_unit(kind, scale):
    model, base = masked(kind, scale=scale), net()
    out = model(images())
    out.square().sum().backward()
    own, leaves, tensors = scores_of(model), {}, {}
    for layer in ("0", "3"):
        parts = {
            n: own[f"base_model.model.{layer}.smn_{n}"]
            for n in ("scores", "unit_scores")
            if "weight" in kind or n != "scores"
        }
        parts = {n: (s.detach() > 0).float().requires_grad_() for n, s in parts.items()}
        leaves.update({f"base_model.model.{layer}.smn_{n}": leaf for n, leaf in parts.items()})
        weight, bias = base.get_parameter(f"{layer}.weight"), base.get_parameter(f"{layer}.bias")
        mask = torch.ones_like(weight)
        for leaf in parts.values():
            mask = mask * leaf
        rows = parts["unit_scores"].flatten() if kind.startswith("row") else torch.ones_like(bias)
        sigma, sigma_bias = (mask.mean().sqrt(), rows.mean().sqrt()) if scale else (1, 1)
        tensors[layer] = weight * mask / sigma, bias * rows / sigma_bias
    x = F.relu(F.conv2d(images(), *tensors["0"])).flatten(1)
    wanted = F.linear(F.relu(F.linear(x, *tensors["3"])), base[5].weight, base[5].bias)
    torch.testing.assert_close(out, wanted)
    gradients = torch.autograd.grad(wanted.square().sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(own[name].grad, gradient, msg=name)


@pytest.mark.parametrize("options", [{}, {"codec": "entropy"}, {"save_scores": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_a_bit_per_weight_and_trains_on_by_units(tmp_path, kind, options):
    model = masked(kind, **options).eval()
    expected, masks = model(images()), model.masks()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(loaded(images()), expected)
    assert all(torch.equal(mask, masks[name]) for name, mask in loaded.masks().items())
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert all(torch.equal(mask, masks[name]) for name, mask in again.masks().items())
    if "weight" in kind and not options.get("save_scores"):  # a unit that comes back has all of its weights
        own = scores_of(again)
        unit, weights = (own[f"base_model.model.3.smn_{name}"] for name in ("unit_scores", "scores"))
        assert (weights[(unit <= 0).expand_as(weights)] > 0).all()
    if options.get("save_scores"):
        assert all(torch.equal(own, scores_of(model)[name]) for name, own in scores_of(again).items())
    copy = get_peft_model(net(), MaskConfig(target_modules=["0", "3"], granularity=kind))
    copy.load_state_dict(model.state_dict())
    assert all(torch.equal(mask, masks[name]) for name, mask in copy.masks().items())
    torch.testing.assert_close(model.merge_and_unload()(images()), expected)


def test_units_of_some_modules_only(tmp_path):
    pattern = {"3": "row+weight"}
    model = get_peft_model(net(), MaskConfig(target_modules=["0", "3"], granularity_pattern=pattern))
    shapes = {name.removeprefix("base_model.model."): tuple(p.shape) for name, p in scores_of(model).items()}
    assert shapes == {"0.smn_scores": (8, 3, 3, 3), "3.smn_scores": (40, 72), "3.smn_unit_scores": (40, 1)}
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(net(), tmp_path).peft_config["default"].granularity_pattern == pattern


def test_units_take_part_in_the_rate_and_only_once():
    model = masked("row+weight", rate=2.0)
    entropies = [p.numel() * _entropy((p > 0).double().mean()) for p in scores_of(model).values()]
    weights = sum(mask.numel() for mask in model.masks().values() if mask.dim() > 1)
    assert model.rate().item() == pytest.approx(2 * sum(entropies) / weights)


def _entropy(p: torch.Tensor) -> float:
    return float(-p * p.log2() - (1 - p) * (1 - p).log2())


def test_a_file_that_is_not_made_of_units_does_not_train_on(tmp_path):
    model = masked("row")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for key in ("3.smn_mask", "3.smn_bias_mask"):
        tensors = load_file(path)
        tensors[f"base_model.model.{key}"][0] ^= 64
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/adapter_config.json").write_bytes((tmp_path / "adapter_config.json").read_bytes())
        save_file(tensors, tmp_path / "other/adapter_model.safetensors")
        with pytest.raises(AdapterFileError, match=f"{key} is not made of whole units, as granularity='row'"):
            PeftModel.from_pretrained(net(), tmp_path / "other", is_trainable=True)


def test_attention_has_a_score_for_each_of_its_projections_rows():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2)), MaskConfig(target_modules=["0"], granularity="row")
    )
    masks = model.masks()
    assert sorted(masks) == ["0.in_proj_bias", "0.in_proj_weight", "0.out_proj.bias", "0.out_proj.weight"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 + 8


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (
            nn.Embedding(8, 8),
            "row",
            r"\(Embedding, .* does not hold its weights output by output.*_pattern={'0': 'weight'}",
        ),
        (nn.ConvTranspose2d(4, 8, 3), "column", r"\(ConvTranspose2d, .* does not hold its weights output by output"),
        (nn.Conv2d(4, 8, 3, groups=2), "column", r"\(Conv2d, .* reads its inputs in groups, as granularity='column'"),
    ],
)
def test_layers_that_cannot_take_them(layer, kind, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(layer), MaskConfig(target_modules=["0"], granularity=kind))


@pytest.mark.parametrize(
    "options", [{"mask_type": "topk", "density": 0.5}, {"trainable_fraction": 0.5}, {"mask_bias": True}]
)
def test_options_that_do_not_go_with_them(options):
    with pytest.raises(
        ValueError, match="granularity='row' needs mask_type, trainable_fraction and mask_bias as they"
    ):
        MaskConfig(granularity_pattern={"fc1": "row"}, **options)


def test_a_pattern_is_checked():
    with pytest.raises(ValueError, match=r"granularity must be one of weight, row, .*; got 'rows'"):
        MaskConfig(granularity_pattern={"fc1": "rows"})
    with pytest.raises(ValueError, match="granularity_pattern is a pattern that may take for ever"):
        MaskConfig(granularity_pattern={"(a*)*b": "row"})


@pytest.mark.parametrize(
    ("name", "options", "rows", "columns"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, "fc1", "fc2"),
        ("resnet26d", {}, "conv[12]", "conv[23]"),
        ("resnetv2_50", {}, "conv[12]", "conv[23]"),
    ],
)
def test_the_default_is_what_can_be_cut_out(name, options, rows, columns):
    for kind, wanted in (("row", rows), ("column", columns)):
        alone = get_peft_model(timm.create_model(name, **options), MaskConfig(granularity=kind))
        layers = {path.rpartition(".")[0] for path in alone.base_model.masks()}
        assert layers
        assert all(re.fullmatch(rf".*\.{wanted}|conv1\.\d", layer) for layer in layers)  # a stem's are as good
        both = get_peft_model(timm.create_model(name, **options), MaskConfig(granularity=f"{kind}+weight"))
        own = {path for path, _ in both.named_parameters() if "unit_scores" in path}
        assert {path.split(".smn_")[0].removeprefix("base_model.model.") for path in own} == layers
        assert len(both.base_model.masks()) > len(alone.base_model.masks()) // 2
        assert both.peft_config["default"].granularity == "weight"
        saved = MaskConfig(**{**both.peft_config["default"].to_dict(), "base_fingerprint": None})
        again = get_peft_model(timm.create_model(name, **options), saved)
        assert {path for path, _ in again.named_parameters() if "unit_scores" in path} == own


def test_a_model_without_hidden_channels():
    with pytest.raises(ValueError, match="has no hidden channels for granularity='row'"):
        get_peft_model(torchvision.models.mobilenet_v2(), MaskConfig(granularity="row"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_what_is_masked(kind):
    build = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=2)
    config = MaskConfig(granularity=kind)
    report = explain_targets(build(), config, verbose=False)
    masks = get_peft_model(build(), config).base_model.masks().values()
    assert report.masked_weights == sum(mask.numel() for mask in masks)
