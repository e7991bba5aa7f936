# SPDX-License-Identifier: Apache-2.0
"""An adapter knows its base: masked weights and all else, whatever is merged; and the caller's config stays his."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from smn_peft import MaskConfig
from smn_peft.backbones import load_classifier
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.tuner.checks import fingerprint_of, fingerprints, masked_parameters, unmasked_tensors

from .test_native_transformers import SIZES


class Net(nn.Module):
    """A body of all kinds, positions, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.body = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("table", torch.rand(4), persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.body(x + self.pos_embed)) * self.scale + self.cls_token
        x = self.attn(x, x, x)[0]
        return self.head(self.norm(x.mean(1)))


X = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
TARGETS = ["body", "attn"]


def config(**options) -> MaskConfig:
    return MaskConfig(**{"target_modules": TARGETS, "init_weights": False, **options})


def saved(folder: Path, model: nn.Module | None = None, **options) -> PeftModel:
    model = get_peft_model(Net() if model is None else model, config(**options)).eval()
    model.save_pretrained(folder)
    return model


def said(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# --- The caller's config ---------------------------------------------------------------------------------------------


def state(config: MaskConfig) -> dict:
    own = {name: copy.deepcopy(value) for name, value in vars(config).items()}
    own.pop("base_model_name_or_path")  # PEFT's own functions write that
    return own


def on_vit(config: MaskConfig, name: str = "default") -> None:
    ViTModel(ViTConfig(**SIZES)).add_adapter(config, name)


@pytest.mark.parametrize(
    "use",
    [
        lambda config: get_peft_model(timm.create_model("resnet18", num_classes=2), config),
        lambda config: get_peft_model(Net(), MaskConfig(target_modules=["body"])).add_adapter("other", config),
        lambda config: inject_adapter_in_model(config, timm.create_model("resnet18", num_classes=2)),
        on_vit,
    ],
    ids=["get_peft_model", "add_adapter", "inject_adapter_in_model", "transformers"],
)
@pytest.mark.parametrize("targets", [["conv1", "body", "fc1"], r".*(conv1|body|fc1)"], ids=["list", "regex"])
def test_no_way_of_adding_an_adapter_writes_to_the_config(use, targets):
    given = MaskConfig(target_modules=targets, codec="entropy")
    before = state(given)
    use(given)
    assert state(given) == before


def test_a_loaded_config_serves_twice(tmp_path):
    first = saved(tmp_path, codec="entropy")
    given = MaskConfig.from_pretrained(tmp_path)
    before = {**state(given), "inference_mode": True}
    for _ in range(2):
        model = PeftModel.from_pretrained(Net(), tmp_path, config=given).eval()
        assert torch.equal(model(X), first(X))
        assert state(given) == before


def test_one_config_for_models_of_two_kinds():
    given = MaskConfig()
    vit = get_peft_model(timm.create_model("vit_tiny_patch16_224", num_classes=2), given)
    mixer = get_peft_model(timm.create_model("mixer_s32_224", num_classes=2), given)
    assert given.target_modules is None
    assert len(vit.base_model.masks()) == 48
    assert len(mixer.base_model.masks()) == 32


def test_the_config_of_another_model_starts_afresh(tmp_path):
    first = saved(tmp_path)
    other = get_peft_model(Net(1), first.peft_config["default"])
    other.save_pretrained(tmp_path / "other")
    assert said(tmp_path / "other")["base_fingerprint"] != said(tmp_path)["base_fingerprint"]


# --- Whatever is merged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["bits", "entropy"])
def test_what_is_saved_while_merged_is_what_is_saved_unmerged(codec, tmp_path):
    options = {"codec": codec, "mask_bias": True, "trainable_fraction": 0.4, "select": "magnitude"}
    model = get_peft_model(Net(), config(batch_norm="adapt", scale=False))
    model.train()(X)
    model.add_adapter("second", config(seed=3, **options))
    model.eval().merge_adapter(["default"])
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "after")
    fresh = get_peft_model(Net(), config(seed=3, **options), adapter_name="second")
    fresh.save_pretrained(tmp_path / "fresh")
    for part in ("second/" + WEIGHTS_NAME, "second/adapter_config.json"):
        merged = (tmp_path / "merged" / part).read_bytes()
        assert merged == (tmp_path / "after" / part).read_bytes() == (tmp_path / "fresh" / part).read_bytes()


def test_a_base_is_checked_while_another_adapter_is_merged(tmp_path):
    saved(tmp_path / "own")
    saved(tmp_path / "other", Net(1))
    model = PeftModel.from_pretrained(Net(), tmp_path / "own")
    model.merge_adapter()
    model.load_adapter(tmp_path / "own", "again")
    with pytest.raises(ValueError, match="does not belong to this base model, whose masked weights differ"):
        model.load_adapter(tmp_path / "other", "other")


def test_a_cast_while_merged_is_not_taken_for_another_base(tmp_path):
    model = saved(tmp_path)
    expected = said(tmp_path)["base_fingerprint"]
    model.merge_adapter()
    model.bfloat16().save_pretrained(tmp_path)
    assert said(tmp_path)["base_fingerprint"] == expected


# --- What else the features depend on --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "frozen.weight body.bias norm.running_mean norm.weight cls_token scale".split())
def test_another_value_outside_the_mask_is_another_base(name, tmp_path):
    saved(tmp_path)
    other = Net()
    with torch.no_grad():
        dict((*other.named_parameters(), *other.named_buffers()))[name].view(-1)[0] += 1e-4
    with pytest.raises(ValueError, match=r"weights or statistics outside the mask differ.*check_base=False"):
        PeftModel.from_pretrained(other, tmp_path)
    given = MaskConfig.from_pretrained(tmp_path)
    given.check_base = False
    PeftModel.from_pretrained(other, tmp_path, config=given)


def test_the_message_says_that_masked_weights_differ(tmp_path):
    saved(tmp_path)
    other = Net()
    with torch.no_grad():
        other.attn.out_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="whose masked weights differ"):
        PeftModel.from_pretrained(other, tmp_path)


def test_what_may_differ_may_differ(tmp_path):
    saved(tmp_path, modules_to_save=["frozen"])
    other = Net()
    with torch.no_grad():
        for tensor in (other.pos_embed, other.head.weight, other.table, other.frozen.bias):
            tensor.add_(1)
        other.index.add_(1)
        other.norm.num_batches_tracked.add_(1)
    PeftModel.from_pretrained(other, tmp_path)


def test_adapted_statistics_are_the_adapters_own(tmp_path):
    saved(tmp_path, batch_norm="adapt")
    other = Net()
    other.norm.running_mean.add_(1)
    PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    with torch.no_grad():
        other.norm.weight.add_(1)
    with pytest.raises(ValueError, match="outside the mask"):
        PeftModel.from_pretrained(other, tmp_path)


def test_another_dtype_is_a_warning(tmp_path):
    saved(tmp_path)
    with pytest.warns(UserWarning, match="cannot be verified in another dtype"):
        PeftModel.from_pretrained(Net().bfloat16(), tmp_path)


def test_an_adapter_of_an_earlier_release_is_not_compared_and_stays_as_it_is(tmp_path):
    saved(tmp_path)
    values = {**said(tmp_path), "unmasked_fingerprint": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    other = Net()
    with torch.no_grad():
        other.frozen.weight.add_(1)
    model = PeftModel.from_pretrained(other, tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert said(tmp_path / "again")["unmasked_fingerprint"] is None
    assert said(tmp_path / "again")["base_fingerprint"] == values["base_fingerprint"]


def test_a_bare_base_has_the_fingerprint_of_the_masked_one(tmp_path):
    model = get_peft_model(Net(), config())
    names = masked_parameters(model, "default")
    assert names == {"body.weight", "attn.in_proj_weight", "attn.out_proj.weight"}
    values = model.peft_config["default"].to_dict()
    expected = fingerprints(model, "default", model.peft_config["default"])[1]
    assert fingerprint_of(Net(), unmasked_tensors(Net(), names, values).values()) == expected
    assert set(unmasked_tensors(Net(), names, values)) == {
        *("cls_token", "scale", "body.bias", "frozen.weight", "frozen.bias"),
        *("attn.in_proj_bias", "attn.out_proj.bias"),
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    }


def test_a_backbone_is_the_same_base_with_any_head():
    bare = timm.create_model("resnet18", num_classes=7)
    classifier = load_classifier("timm/resnet18", 3, pretrained=False).model
    own = classifier.backbone.state_dict()
    own.update({f"timm_model.{k}": v for k, v in bare.state_dict().items() if f"timm_model.{k}" in own})
    classifier.backbone.load_state_dict(own)
    seen = set()
    for model in (bare, classifier):
        masked = get_peft_model(model, MaskConfig(modules_to_save=["fc" if model is bare else "head"]))
        seen.add(fingerprints(masked, "default", masked.peft_config["default"])[1])
    assert len(seen) == 1


def test_a_text_tower_is_not_the_vision_towers_base():
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    text = {**sizes, "vocab_size": 16, "max_position_embeddings": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(SIZES), projection_dim=8))
    masked = get_peft_model(model, MaskConfig())
    names = unmasked_tensors(masked, masked_parameters(masked, "default"), {})
    assert names
    assert all(name.startswith("vision_model.") for name in names)
