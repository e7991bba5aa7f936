# SPDX-License-Identifier: Apache-2.0
"""Hidden channels and heads that are off are cut out: the same outputs, smaller layers, refusals by name."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from smn_peft import MaskConfig
from smn_peft.paper.cifar_resnet import CifarResNet
from smn_peft.tuner.slicing import load_sliced, save_sliced, slice_model
from smn_peft.tuner.targets import hidden_channels

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:Unable to fetch remote file")


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))


MODELS = {
    "timm's ViT": (vit, r".*\.(?:fc2|proj)", 32),
    "transformers' CLIP": (clip, r".*\.(?:fc2|out_proj)", 32),
    "torchvision's ViT": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
        r".*\.mlp\.3",
        32,
    ),
    "timm's ResNetV2": (lambda: timm.create_model("resnetv2_50", num_classes=5), r".*conv[23]", 64),
    "timm's ResNet": (lambda: timm.create_model("resnet26d", num_classes=5), r".*conv[23]", 64),
    "torchvision's ResNet": (lambda: torchvision.models.resnet18(num_classes=5), r".*conv2", 64),
    "timm's ConvNeXt": (lambda: timm.create_model("convnext_atto", num_classes=5), r".*\.fc2", 64),
    "a ResNet of functions": (CifarResNet, r".*conv2", 32),
}


def prepared(build) -> nn.Module:
    """A model whose norms are not as they were made."""
    torch.manual_seed(0)
    model = build().requires_grad_(False).eval()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dim() == 1 and tensor.is_floating_point():
                is_scale = name in ("weight", "running_var")
                tensor.copy_(0.5 + torch.rand_like(tensor) if is_scale else 0.1 * torch.randn_like(tensor))
    return model


def switched(model: nn.Module, granularity: str, targets: str, share: float = 0.4) -> nn.Module:
    """A mask of which this share of units is off, and one head of each attention's output."""
    model = get_peft_model(model, MaskConfig(target_modules=targets, granularity=granularity))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "unit_scores" in name:
            off = torch.rand(parameter.shape, generator=generator) < share
            if name.split(".smn")[0].endswith((".proj", ".out_proj")):
                off = torch.zeros_like(off)
                off[:, : off.shape[1] // (4 if "out_proj" in name else 3)] = True
            parameter.data.masked_fill_(off, -1)
    return model.eval()


def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize("name", MODELS)
def test_the_sliced_model_computes_what_the_masked_one_does(name, tmp_path):
    build, targets, side = MODELS[name]
    model, images = switched(prepared(build), "column+weight", targets), torch.randn(3, 3, side, side)
    wanted = outputs(model, images)
    sliced = slice_model(model, images[:2])
    torch.testing.assert_close(outputs(sliced, images), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (build(), sliced))
    assert after < 0.9 * before
    for pair in hidden_channels(sliced):
        consumer = sliced.get_submodule(pair.consumer).weight
        if pair.consumer.endswith(("conv2", "conv3", "fc2", "3")) and targets != r".*conv2":
            assert consumer.transpose(0, 1).flatten(1).any(1).all(), pair
    save_sliced(sliced, tmp_path / "model.safetensors")
    loaded = load_sliced(prepared(build), tmp_path / "model.safetensors")
    assert torch.equal(outputs(loaded, images), outputs(sliced, images))
    torch.testing.assert_close(outputs(model, images), wanted)  # it stays as it is


@pytest.mark.parametrize(("build", "heads"), [(vit, 3), (clip, 4)])
def test_a_head_that_nothing_reads_goes(build, heads):
    model, images = switched(prepared(build), "column", r".*\.(?:proj|out_proj)"), torch.randn(2, 3, 32, 32)
    sliced = slice_model(model)
    torch.testing.assert_close(outputs(sliced, images), outputs(model, images), rtol=1e-4, atol=1e-5)
    attentions = [module for module in sliced.modules() if hasattr(module, "num_heads")]
    assert [module.num_heads for module in attentions] == [heads - 1] * 2
    assert torch.compile(sliced, backend="eager")(images) is not None


class Mlp(nn.Module):
    """Two layers whose hidden units may be read by others, or act on each other."""

    def __init__(self, act: nn.Module, extra: str = "") -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.extra = nn.Linear(6, 16), act, nn.Linear(16, 6), extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        out = self.fc2(self.act(hidden))
        return out + hidden[..., :6] if self.extra else out


def masked_rows(model: nn.Module, granularity: str = "row") -> nn.Module:
    target = "fc1" if granularity == "row" else "fc2"
    model = get_peft_model(model.requires_grad_(False), MaskConfig(target_modules=[target], granularity=granularity))
    units = next(p for name, p in model.named_parameters() if "unit_scores" in name)
    units.data.flatten()[::3] = -1
    return model.eval()


@pytest.mark.parametrize("act", [nn.GELU(), nn.Sigmoid(), nn.Softplus()])
def test_what_a_unit_without_row_gives_goes_into_the_next_bias(act):
    model, x = masked_rows(Mlp(act)), torch.randn(4, 6)
    sliced = slice_model(model, x)
    assert (sliced.fc1.out_features, sliced.fc2.in_features) == (10, 10)
    torch.testing.assert_close(sliced(x), model(x))


@pytest.mark.parametrize(
    ("model", "granularity"), [(Mlp(nn.GELU(), "residual"), "row"), (Mlp(nn.LayerNorm(16)), "column")]
)
def test_units_that_something_else_reads_stay(model, granularity):
    model, x = masked_rows(model, granularity), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="6 channels of fc1 are off and stay: not only fc2 reads them"):
        sliced = slice_model(model, x)
    assert sliced.fc1.out_features == 16
    torch.testing.assert_close(sliced(x), model(x))


def test_what_a_padded_convolution_would_read_as_a_constant_stays():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
    model, images = nn.Sequential(*layers).eval().requires_grad_(False), torch.randn(2, 3, 6, 6)
    model[1].bias.copy_(torch.randn(8))
    masked = get_peft_model(model, MaskConfig(target_modules=["0"], granularity="row"))
    next(p for name, p in masked.named_parameters() if "unit_scores" in name).data[:3] = -1
    with pytest.warns(
        UserWarning, match="3 channels of 0 are off and stay: 2 pads what comes of them; granularity 'col"
    ):
        sliced = slice_model(masked, images)
    assert sliced[0].out_channels == 8
    masked.base_model.model[1].bias.zero_()
    masked.base_model.model[1].running_mean.zero_()
    assert slice_model(masked, images)[0].out_channels == 5  # zero is what padding is


def test_one_unit_stays_where_all_are_off():
    model, x = masked_rows(Mlp(nn.GELU())), torch.randn(4, 6)
    next(p for name, p in model.named_parameters() if "unit_scores" in name).data.fill_(-1)
    sliced = slice_model(model, x)
    assert sliced.fc1.out_features == 1
    torch.testing.assert_close(
        sliced(x), F.linear(torch.zeros(4, 16), model.base_model.model.fc2.weight, sliced.fc2.bias)
    )


def test_a_file_of_another_architecture_is_refused(tmp_path):
    save_sliced(slice_model(masked_rows(Mlp(nn.GELU())), torch.randn(4, 6)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not of a Sequential of this size"):
        load_sliced(nn.Sequential(nn.Linear(6, 6)), tmp_path / "model.safetensors")
    smaller = Mlp(nn.GELU())
    smaller.fc1, smaller.fc2 = nn.Linear(6, 3), nn.Linear(3, 6)
    with pytest.raises(ValueError, match=r"not of a Mlp of this size: fc1\.\w+ \(10.*, not \(3"):
        load_sliced(smaller, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        load_sliced(Mlp(nn.GELU()), tmp_path / "model.safetensors")
