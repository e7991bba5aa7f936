# SPDX-License-Identifier: Apache-2.0
"""A backbone with a head: what is masked, saved and standardised, and that the head comes back the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from peft import PeftModel, get_peft_model
from timm.models import save_for_hf
from torch import nn

from smn_peft import MaskConfig, explain_targets
from smn_peft.backbones import Backbone, Classifier, load_backbone, load_classifier, pooled_features

from .tiny import TINY

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(params=["clip", "clip_projection", "test_resnet", "vit", "convnext"])
def make(request, clip_folder) -> Callable[[], Backbone]:
    """Function that gives the same small backbone with each call."""

    def load() -> Backbone:
        torch.manual_seed(0)
        if request.param.startswith("clip"):
            return load_backbone(clip_folder, projection=request.param.endswith("projection"))
        name, options = {
            "test_resnet": ("test_resnet", {}),
            "vit": ("vit_tiny_patch16_224", {**VIT, "image_size": 32}),
            "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
        }[request.param]
        return load_backbone(name, pretrained=False, **options)

    return load


def resnet() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("test_resnet", pretrained=False)


def images(backbone: Backbone, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, min(backbone.image_size, 64), min(backbone.image_size, 64))


def masked(model: nn.Module) -> set[str]:
    return set(model.base_model.masks())


def randomise(model: PeftModel, seed: int) -> None:
    """Masks with zeros in them and a head off its start, both after the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) + (0.5 if "smn_" in name else 0))


def test_logits_are_the_head_on_the_pooled_features(make):
    backbone = make()
    loaded = load_classifier(backbone, 7)
    assert isinstance(loaded.model, Classifier)
    assert not loaded.model.training
    assert (loaded.feature_dim, loaded.image_size, loaded.name) == (
        backbone.feature_dim,
        backbone.image_size,
        backbone.name,
    )
    pixel_values = images(backbone)
    with torch.no_grad():
        features = backbone.features(pixel_values)
        torch.testing.assert_close(loaded.features(pixel_values), features, rtol=0, atol=0)
        head = loaded.model.head
        expected = features @ head.weight.T + head.bias
        torch.testing.assert_close(loaded.model(pixel_values), expected)


def test_masks_what_would_be_masked_without_the_head(make):
    config = MaskConfig(modules_to_save=["head"])
    bare = explain_targets(make().model, verbose=False)
    report = explain_targets(load_classifier(make(), 7).model, config, verbose=False)
    assert report.masked_weights == bare.masked_weights > 0
    assert next(row.reason for row in report.rows if row.name == "head") == "modules_to_save"
    names = masked(get_peft_model(make().model, MaskConfig()))
    assert masked(get_peft_model(load_classifier(make(), 7).model, config)) == {f"backbone.{name}" for name in names}


def test_save_and_load_is_bit_identical(make, tmp_path):
    backbone = make()
    model = get_peft_model(load_classifier(backbone, 7).model, MaskConfig(modules_to_save=["head"]))
    randomise(model, 1)
    model.eval()
    pixel_values = images(backbone)
    with torch.no_grad():
        expected, features = model(pixel_values), pooled_features(model, pixel_values)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"] or "") == backbone.model.name_or_path
    assert config["base_fingerprint"]

    again = PeftModel.from_pretrained(load_classifier(make(), 7, head_seed=5).model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values), expected)
        assert torch.equal(pooled_features(again, pixel_values), features)


def test_another_base_is_refused(tmp_path):
    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return load_classifier("test_resnet", 3, pretrained=False).model

    get_peft_model(fresh(0), MaskConfig(modules_to_save=["head"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(fresh(0), tmp_path)
    with pytest.raises(ValueError, match="does not belong to this base model"):
        PeftModel.from_pretrained(fresh(1), tmp_path)


def test_the_adapter_names_its_base(clip_folder):
    model = get_peft_model(load_classifier(clip_folder, 3).model, MaskConfig(modules_to_save=["head"]))
    assert model.peft_config["default"].base_model_name_or_path == str(clip_folder)
    assert model.get_base_model().config is model.get_base_model().backbone.config


def test_a_seeded_head_is_the_same_in_another_process():
    before = torch.random.get_rng_state()
    head = Classifier(nn.Identity(), 16, 5, head_seed=3).head
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn_elsewhere = torch.tensor([-0.24786824, -0.19721532, -0.10707876, 0.01415190, 0.21215427])
    torch.testing.assert_close(torch.cat([head.weight[0, :3], head.bias[-2:]]), drawn_elsewhere, rtol=0, atol=1e-7)
    assert not torch.equal(head.weight, Classifier(nn.Identity(), 16, 5, head_seed=4).head.weight)
    wide = Classifier(nn.Identity(), 400, 100).head.weight
    assert wide.abs().max() <= 1 / 20
    assert wide.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)  # of a uniform distribution


def test_a_frozen_random_head_can_be_masked(tmp_path):
    backbone = resnet()
    model = get_peft_model(
        load_classifier(backbone, 7, head_seed=2).model, MaskConfig(target_modules=r"head|.*\.layer4\..*conv1")
    )
    assert "head.weight" in masked(model)
    randomise(model, 1)
    pixel_values = images(backbone)
    with torch.no_grad():
        expected = model.eval()(pixel_values)
    model.save_pretrained(tmp_path)
    same = load_classifier(resnet(), 7, head_seed=2).model
    with torch.no_grad():
        assert not torch.equal(same(pixel_values), expected)
        assert torch.equal(PeftModel.from_pretrained(same, tmp_path).eval()(pixel_values), expected)


# --- set_head --------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(nn.Flatten(), 12, 4)


def probe() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(4, 12),
        "bias": torch.randn(4),
        "mean": torch.randn(12) + 5,
        "std": torch.rand(12) + 0.5,
    }


def test_set_head_standardises(classifier):
    values = probe()
    classifier.set_head(**values)
    pixel_values = torch.randn(5, 3, 2, 2)
    inputs = (pixel_values.flatten(1) - values["mean"]) / values["std"]
    torch.testing.assert_close(classifier(pixel_values), inputs @ values["weight"].T + values["bias"])
    assert torch.equal(classifier.forward_head(inputs, pre_logits=True), inputs)
    classifier.set_head(values["weight"])  # without the rest: no bias, features as they are
    torch.testing.assert_close(classifier(pixel_values), pixel_values.flatten(1) @ values["weight"].T)


def test_standardisation_is_saved_with_the_head(tmp_path):
    backbone = resnet()
    loaded = load_classifier(backbone, 4)
    dim = backbone.feature_dim
    loaded.model.set_head(torch.randn(4, dim), torch.randn(4), torch.randn(dim), torch.rand(dim) + 0.5)
    model = get_peft_model(loaded.model, MaskConfig(modules_to_save=["head"]))
    pixel_values = images(backbone)
    with torch.no_grad():
        expected = model.eval()(pixel_values)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_classifier(resnet(), 4).model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values), expected)


def test_a_mixed_batch_has_each_adapters_own_head_and_features():
    backbone = resnet()
    model = get_peft_model(load_classifier(backbone, 4).model, MaskConfig(modules_to_save=["head"]), adapter_name="a")
    model.add_adapter("b", MaskConfig(modules_to_save=["head"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "smn_scores" in name or ".modules_to_save." in name:
                value.copy_(torch.rand(value.shape, generator=generator) + (-0.2 if "smn_" in name else 0.5))
    model.eval()
    pixel_values = images(backbone, 2)
    alone = {}
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            alone[name] = model(pixel_values), pooled_features(model, pixel_values)
        logits = model(pixel_values, adapter_names=["a", "b"])
        features = pooled_features(model, pixel_values, adapter_names=["a", "b"])
    for row, name in enumerate("ab"):
        torch.testing.assert_close(logits[row], alone[name][0][row])
        torch.testing.assert_close(features[row], alone[name][1][row])
    assert not torch.allclose(alone["a"][1], alone["b"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 11)}, r"weight must be of shape \(4, 12\); got \(4, 11\)"),
        ({"bias": torch.zeros(3)}, r"bias must be of shape \(4,\)"),
        ({"mean": torch.zeros(1, 12)}, r"feature_mean must be of shape \(12,\)"),
        ({"weight": torch.full((4, 12), torch.nan)}, "weight holds NaN or infinity"),
        ({"std": torch.cat([torch.zeros(2), torch.ones(10)])}, r"not above 0 in 2 features: clamp it"),
    ],
)
def test_set_head_refuses(classifier, change, message):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        classifier.set_head(**{**probe(), **change})
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_set_head_comes_before_the_adapter(classifier):
    config = MaskConfig(target_modules=["head"])
    model = get_peft_model(classifier, config)
    with pytest.raises(ValueError, match=r"wraps the head \(Linear\): call set_head before get_peft_model"):
        model.get_base_model().set_head(torch.zeros(4, 12))


def test_a_masked_head_cannot_standardise(classifier):
    classifier.set_head(**probe())
    model = get_peft_model(classifier, MaskConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="masked and its input standardised"):
        model(torch.randn(2, 3, 2, 2))


def test_a_half_precision_backbone_keeps_its_head_in_fp32():
    classifier = load_classifier("test_resnet", 3, pretrained=False, dtype="bfloat16").model
    assert classifier.head.weight.dtype == torch.float32
    assert classifier(torch.randn(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(("sizes", "name"), [((12, 0), "num_classes"), ((-1, 2), "feature_dim")])
def test_sizes_are_checked(sizes, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Classifier(nn.Identity(), *sizes)


def test_bad_arguments_of_load_classifier():
    backbone = resnet()
    with pytest.raises(ValueError, match="image_size: test_resnet is loaded already; pass this to load_backbone"):
        load_classifier(backbone, 3, image_size=64)


CLASSIFIERS = {
    "vit": ("ViTForImageClassification", TINY),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 32], "depths": [1, 1], "num_stages": 2}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1]}),
    "beit": ("BeitForImageClassification", TINY),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.filterwarnings("ignore:.* has no preprocessor_config")
def test_the_classifier_of_a_transformers_checkpoint(family, tmp_path, perturbed):
    name, settings = CLASSIFIERS[family]
    model_class = getattr(transformers, name)
    model = perturbed(model_class(model_class.config_class(**settings, num_labels=5)))
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = load_classifier(tmp_path, image_size=32).model(pixel_values)
        torch.testing.assert_close(found, model(pixel_values).logits)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_18d"])
def test_the_classifier_of_a_timm_checkpoint(name, tmp_path, perturbed):
    options = VIT if name.startswith("vit") else {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 8}
    model = perturbed(timm.create_model(name, num_classes=5, **options))
    save_for_hf(model, str(tmp_path), model_args=options, safe_serialization=True)
    (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
    pixel_values = torch.randn(2, 3, 224, 224)
    of_folder = load_classifier(tmp_path)
    of_file = load_classifier(name, state_dict=tmp_path / "model.safetensors", **options)
    with torch.no_grad():
        for loaded in (of_folder, of_file):
            torch.testing.assert_close(loaded.model(pixel_values), model(pixel_values))


@pytest.mark.filterwarnings("ignore:.* has no preprocessor_config")
def test_checkpoints_without_a_linear_classifier(clip_folder, tmp_path, perturbed):
    dino = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY))  # of token and mean together
    perturbed(dino).save_pretrained(tmp_path / "dino")
    clip = transformers.CLIPForImageClassification(transformers.CLIPConfig.from_pretrained(clip_folder))  # of the mean
    perturbed(clip).save_pretrained(tmp_path / "mean")
    bare = timm.create_model("test_resnet", num_classes=0).state_dict()
    for name, options, reason in (
        (clip_folder, {}, "do not fit its config"),
        (tmp_path / "dino", {}, "logits of Dinov2ForImageClassification are not a linear layer"),
        (tmp_path / "mean", {}, "logits of CLIPForImageClassification are not a linear layer"),
        ("test_resnet", {"state_dict": bare}, r"holds no fc\.weight"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)no classifier of one linear layer .*{reason}.*: pass num_classes"):
            load_classifier(name, **options)
    for name, options in ((resnet(), {}), ("test_resnet", {"pretrained": False})):
        with pytest.raises(ValueError, match="num_classes is needed where no checkpoint is loaded"):
            load_classifier(name, **options)
