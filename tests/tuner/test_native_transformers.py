# SPDX-License-Identifier: Apache-2.0
"""The adapter methods of transformers itself (`add_adapter`, `load_adapter`) on masks, without a PeftModel."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModel, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, ViTConfig, ViTModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from smn_peft import MaskConfig
from smn_peft.storage.adapter_file import WEIGHTS_NAME, read_adapter_file
from smn_peft.tuner import MaskLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saved as bits"),
    pytest.mark.skipif(
        Version(peft.__version__) < Version(MIN_PEFT_VERSION),
        reason=f"these methods of this transformers ask for PEFT {MIN_PEFT_VERSION}, whatever the adapter",
    ),
]

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def clip() -> PreTrainedModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZES)).eval()


@pytest.fixture
def build():
    return vit


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=PIXELS).pooler_output


def masks(model: nn.Module, name: str) -> list[Tensor]:
    return [
        layer.mask(name, slot)
        for layer in model.modules()
        if isinstance(layer, MaskLayer)
        for slot in layer.smn_info[name].slots
    ]


def train(model: nn.Module) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (model(pixel_values=PIXELS).pooler_output * torch.arange(16.0)).square().sum().backward()
        optimizer.step()
    model.eval()


def saved(build, folder: Path, **options) -> Tensor:
    """Train natively, save natively; the output."""
    model = build()
    model.add_adapter(MaskConfig(**options))
    train(model)
    model.save_pretrained(folder)
    return run(model)


def test_a_native_adapter_trains_masks_only(build):
    model, base = build(), build()
    model.add_adapter(MaskConfig(), adapter_name="task")
    assert model.active_adapters() == ["task"]
    assert torch.equal(run(model), run(base))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("smn_scores" in name for name in names)
    train(model)
    assert not torch.equal(run(model), run(base))
    model.disable_adapters()
    assert torch.equal(run(model), run(base))
    model.enable_adapters()
    assert not torch.equal(run(model), run(base))


@pytest.mark.parametrize("options", [{}, {"save_scores": True}], ids=["bits", "scores"])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("build", [clip, vit], ids=["clip", "vit"])
def test_native_saving_and_loading(build, tmp_path, options, is_trainable):
    expected = saved(build, tmp_path, **options)
    assert all("smn_" in key for key in read_adapter_file(tmp_path))
    assert not torch.equal(expected, run(build()))
    model = build()
    model.load_adapter(str(tmp_path), adapter_name="task", is_trainable=is_trainable)
    assert torch.equal(run(model), expected)  # a loader that is not understood would give the bare base
    assert any(parameter.requires_grad for parameter in model.parameters()) == is_trainable
    if is_trainable:
        before = masks(model, "task")
        train(model)
        assert any(not torch.equal(old, new) for old, new in zip(before, masks(model, "task"), strict=True))


def test_saved_scores_are_loaded_natively(build, tmp_path):
    model = build()
    model.add_adapter(MaskConfig(save_scores=True))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = build()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    own = {name: parameter for name, parameter in model.named_parameters() if "smn_scores" in name}
    run(loaded)  # the bits that came with them change nothing
    for name, parameter in loaded.named_parameters():
        if "smn_scores" in name:
            assert torch.equal(parameter, own[name])


def test_scores_written_by_hand_before_the_first_forward_stay(build):
    model, other = build(), build()
    for each in (model, other):
        each.add_adapter(MaskConfig())
    scores = [parameter for name, parameter in model.named_parameters() if "smn_scores" in name]
    with torch.no_grad():
        for parameter in scores:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in scores]
    assert not torch.equal(run(model), run(other))
    assert all(torch.equal(parameter, old) for parameter, old in zip(scores, before, strict=True))


@pytest.mark.parametrize("is_config_given", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_compiled_before_its_first_forward_has_what_was_loaded(build, tmp_path, is_config_given):
    expected = saved(build, tmp_path)
    model = build()
    given = {"peft_config": MaskConfig(), "adapter_state_dict": read_adapter_file(tmp_path)} if is_config_given else {}
    model.load_adapter(None if is_config_given else str(tmp_path), is_trainable=True, **given)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(pixel_values=PIXELS).pooler_output
    torch.testing.assert_close(compiled, expected)


def test_native_and_peft_read_each_other_s_files(build, tmp_path):
    expected = saved(build, tmp_path / "native")
    model = PeftModel.from_pretrained(build(), tmp_path / "native").eval()
    assert torch.equal(run(model), expected)
    model.save_pretrained(tmp_path / "peft")
    native = build()
    native.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(run(native), expected)
    native.save_pretrained(tmp_path / "again")
    first, second = (read_adapter_file(tmp_path / name) for name in ("peft", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert sum(t.numel() for t in first.values()) < 4 * sum(m.numel() for m in masks(native, "default")) // 8


def test_several_native_adapters_switch_and_go(build, tmp_path):
    outputs = {}
    for seed, name in enumerate(("one", "two", "three")):
        model = build()
        model.add_adapter(MaskConfig(init_weights=False, seed=seed))
        model.save_pretrained(tmp_path / name)
        outputs[name] = run(model)
    host = build()
    for name in outputs:
        host.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("two", "one", "three", "two"):
        host.set_adapter(name)
        assert torch.equal(run(host), outputs[name])
    host.delete_adapter("two")
    host.set_adapter("one")
    assert torch.equal(run(host), outputs["one"])
    assert not any("two" in key for key in host.state_dict())


def test_a_saved_base_and_adapter_load_by_one_path(build, tmp_path):
    build().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, MaskConfig(init_weights=False))
    expected = run(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS_NAME).stat().st_size < 10_000
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.peft_config["default"], MaskConfig)
    assert torch.equal(run(loaded), expected)
    native = AutoModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(run(native), expected)


def test_hot_swapping_replaces_the_mask_in_its_slot(build, tmp_path):
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        model = get_peft_model(build(), MaskConfig(init_weights=False, seed=seed)).eval()
        model.save_pretrained(tmp_path / name)
        outputs[name] = run(model)
    host = PeftModel.from_pretrained(build(), tmp_path / "one").eval()
    assert torch.equal(run(host), outputs["one"])
    host.load_adapter(tmp_path / "two", "default")
    assert torch.equal(run(host), outputs["two"])
    assert list(host.peft_config) == ["default"]


def test_a_native_adapter_of_another_base_is_refused(build, tmp_path):
    saved(build, tmp_path)
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    before = run(other)
    with pytest.raises(ValueError, match="does not belong to this base model"):
        other.load_adapter(str(tmp_path))
    assert torch.equal(run(other), before)
    assert not any(isinstance(module, MaskLayer) for module in other.modules())
