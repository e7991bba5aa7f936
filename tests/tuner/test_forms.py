# SPDX-License-Identifier: Apache-2.0
"""What only one layer type has: unbatched inputs, output sizes, attention masks, base weights that train too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from smn_peft import MaskConfig
from smn_peft.tuner import MaskLayer
from smn_peft.tuner.wrapper import call_with


class Wrap(nn.Module):
    """Hands everything on to one layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


def pair(body: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The layer with an adapter, and a copy with the effective weights written in by hand."""
    plain = Wrap(copy.deepcopy(body)).eval().requires_grad_(False)
    model = get_peft_model(Wrap(body), MaskConfig(target_modules=["body"], init_weights=False, **options)).eval()
    layer = layer_of(model)
    for slot in layer.smn_info["default"].slots:
        mask, parameter = layer.mask("default", slot), plain.body.get_parameter(slot.path)
        parameter.data = parameter.data * mask / (mask.double().mean().sqrt().to(parameter.dtype))
    return model, plain


def layer_of(model: nn.Module) -> MaskLayer:
    return next(module for module in model.modules() if isinstance(module, MaskLayer))


def assert_same_outputs(model: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs), rtol=1e-5, atol=1e-5)


# --- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (3, 9)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
        (nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 6)),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_without_a_batch_dimension(body, shape):
    model, plain = pair(body)
    assert_same_outputs(model, plain, torch.randn(shape))
    assert model(torch.randn(shape)).dim() == len(shape)


@pytest.mark.parametrize("size", [(9, 10), (10, 9)])
def test_the_output_size_of_a_transposed_convolution(size):
    model, plain = pair(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1))
    x = torch.randn(2, 3, 5, 5)
    assert_same_outputs(model, plain, x, output_size=list(size))
    assert model(x, output_size=list(size)).shape[2:] == size


def test_channels_last():
    model, plain = pair(nn.Conv2d(4, 6, 3))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 7, 7).to(memory_format=torch.channels_last)
    assert_same_outputs(model, plain, x)
    model(x).square().sum().backward()
    assert layer_of(model).smn_scores["default"].grad is not None


@pytest.mark.parametrize("init_score", [1.0, "kaiming_uniform"])
def test_scores_lie_in_memory_as_their_weight_does(init_score):
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    model = get_peft_model(base, MaskConfig(target_modules=["0"], init_score=init_score))
    assert layer_of(model).smn_scores["default"].stride() == base[0].weight.stride()


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_may_write_to_the_output_of_a_linear(bias):
    for shape in ((2, 3, 5), (2, 5), (5,)):
        model, plain = pair(nn.Linear(5, 3, bias=bias))
        x = torch.randn(shape)
        out = model(x)
        out += 1
        out.sum().backward()
        torch.testing.assert_close(out, plain(x) + 1, rtol=1e-5, atol=1e-5)
        assert layer_of(model).smn_scores["default"].grad.any()


def test_an_empty_batch():
    for body, shape in ((nn.Linear(5, 3), (0, 5)), (nn.Conv2d(3, 4, 3), (0, 3, 6, 6)), (nn.Embedding(5, 3), (0,))):
        model, plain = pair(body)
        x = torch.zeros(shape, dtype=torch.long) if isinstance(body, nn.Embedding) else torch.randn(shape)
        assert_same_outputs(model, plain, x)


@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 2}], ids=str)
def test_the_gradient_of_an_embedding(options):
    model, plain = pair(nn.Embedding(5, 3, **options))
    layer, x = layer_of(model), torch.tensor([[0, 2, 2, 4]])
    weights = torch.randn(1, 4, 3)
    (model(x) * weights).sum().backward()
    plain.body.weight.requires_grad_()
    (plain(x) * weights).sum().backward()
    mask, theta, g = layer.mask("default"), layer.base_layer.weight, plain.body.weight.grad
    s = (mask.numel() / mask.sum()).sqrt()
    expected = s * theta * g - s**2 / (2 * mask.numel()) * (g * plain.body.weight.detach()).sum()
    torch.testing.assert_close(layer.smn_scores["default"].grad, expected.detach(), rtol=1e-5, atol=1e-6)


# --- Attention -------------------------------------------------------------------------------------------------------

MASK = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * 4 + [True]] * 2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"need_weights": False},
        {"attn_mask": MASK},
        {"attn_mask": MASK, "is_causal": True, "need_weights": False},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING, "attn_mask": MASK, "average_attn_weights": False},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False, "add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_takes_every_argument(kwargs, options, batch_first):
    torch.manual_seed(0)
    model, plain = pair(nn.MultiheadAttention(8, 2, batch_first=batch_first, **options), mask_bias=True)
    tensors = [torch.randn(2, 5, size) for size in (8, options.get("kdim", 8), options.get("vdim", 8))]
    tensors = tensors if batch_first else [tensor.transpose(0, 1) for tensor in tensors]
    assert_same_outputs(model, plain, *tensors, **kwargs)


def test_attention_without_a_batch_and_with_one_tensor():
    model, plain = pair(nn.MultiheadAttention(8, 2, batch_first=True))
    for x in (torch.randn(5, 8), torch.randn(2, 5, 8)):
        assert_same_outputs(model, plain, x, x, x)
        with torch.inference_mode():
            torch.testing.assert_close(model(x, x, x), plain(x, x, x), rtol=1e-5, atol=1e-5)


def test_a_decoder_layer_reads_its_attentions():
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, dropout=0.0).eval()
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = base(x, memory)
        model = get_peft_model(base, MaskConfig(target_modules=["self_attn", "multihead_attn", "linear1"])).eval()
        torch.testing.assert_close(model(x, memory), expected)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "multihead_attn.smn_out_proj_scores" in name:
                    parameter.neg_()
        assert not torch.allclose(model(x, memory), expected)


# --- Base weights that train too -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
@pytest.mark.parametrize("body", [nn.Linear(5, 4), nn.Conv2d(5, 4, 1)], ids=["linear", "conv"])
def test_an_unfrozen_base_weight_gets_the_masked_gradient(body, packed):
    body = copy.deepcopy(body)
    model, plain = pair(body, inference_mode=packed)
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_()
    x = torch.randn(3, 5, 2, 2) if isinstance(body, nn.Conv2d) else torch.randn(3, 5)
    with torch.no_grad():
        model(x)  # fills the cache
    model(x).square().sum().backward()
    plain.body.weight.requires_grad_()
    plain(x).square().sum().backward()
    mask = layer.mask("default")
    expected = plain.body.weight.grad * mask / mask.float().mean().sqrt()
    torch.testing.assert_close(layer.base_layer.weight.grad, expected, rtol=1e-5, atol=1e-5)
    assert packed or layer.smn_scores["default"].grad is not None


def test_a_frozen_bias_gets_no_gradient_and_a_free_one_does():
    model, _ = pair(nn.Linear(5, 4))
    layer = layer_of(model)
    model(torch.randn(3, 5)).sum().backward()
    assert layer.base_layer.bias.grad is None
    layer.base_layer.bias.requires_grad_()
    model(torch.randn(3, 5)).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((4,), 3.0))


# --- Substitution ----------------------------------------------------------------------------------------------------


def test_call_with_puts_everything_back():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in attention.named_parameters()}
    attributes = set(attention.__dict__), set(attention.out_proj.__dict__)
    x = torch.randn(2, 3, 8)
    zeros = {"in_proj_weight": torch.zeros(24, 8), "out_proj.weight": torch.zeros(8, 8)}
    out = call_with(attention, zeros, x, x, x)[0]
    assert torch.equal(out, attention.out_proj.bias.expand_as(out))
    with pytest.raises(AssertionError, match="does not match"):
        call_with(attention, zeros, x, x[:, :, :3], x)
    assert (set(attention.__dict__), set(attention.out_proj.__dict__)) == attributes
    for name, parameter in attention.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_call_with_wins_over_plain_attributes_as_fsdp_sets_them():
    linear = nn.Linear(3, 2)
    gathered = torch.ones(2, 3)
    linear.__dict__["weight"] = gathered
    x = torch.randn(4, 3)
    out = call_with(linear, {"weight": torch.zeros(2, 3)}, x)
    assert torch.equal(out, linear.bias.expand(4, 2))
    assert linear.weight is gathered


def test_call_with_passes_gradients_on():
    linear = nn.Linear(3, 2)
    weight = torch.randn(2, 3, requires_grad=True)
    call_with(linear, {"weight": weight}, torch.ones(4, 3)).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 3), 4.0))
    assert linear.weight.grad is None


def test_the_layer_says_what_it_is():
    model, _ = pair(nn.Conv2d(3, 4, 3))
    assert "smn.Conv(" in repr(model)
    layer = layer_of(model)
    assert (layer.in_features, layer.out_features, layer.in_channels, layer.out_channels) == (3, 4, 3, 4)
    assert isinstance(layer.weight, Tensor)
    expected = layer.base_layer.weight * layer.mask("default") / layer.mask("default").float().mean().sqrt()
    torch.testing.assert_close(layer.weight, expected)
