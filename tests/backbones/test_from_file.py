# SPDX-License-Identifier: Apache-2.0
"""A user's own model from a Python file: what comes through, and what every mistake says."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from smn_peft import MaskConfig
from smn_peft.backbones import is_file_spec, load_classifier, load_from_file

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Sizes:
    width: int = 8

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, Sizes().width, 3)

    def forward(self, pixel_values):
        return self.conv(pixel_values)

def build():
    model = Net()
    model.mean, model.std, model.image_size = torch.tensor([0.1, 0.2, 0.3]), [0.4, 0.5, 0.6], 16
    return model
"""


def write(folder: Path, text: str, name: str = "model.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def with_build(body: str) -> str:
    return f"{MODEL}\ndef other():\n    {body}\n"


def test_a_module_with_its_own_settings(tmp_path, recwarn):
    spec = f"{write(tmp_path, MODEL)}:build"
    backbone = load_from_file(spec)
    assert (backbone.name, backbone.feature_dim, backbone.image_size) == (spec, 8, 16)
    assert backbone.mean == pytest.approx((0.1, 0.2, 0.3))
    assert backbone.std == (0.4, 0.5, 0.6)
    assert not backbone.model.training
    assert backbone.features(torch.zeros(2, 3, 16, 16)).shape == (2, 8)
    assert not [warning for warning in recwarn if "does not say" in str(warning.message)]
    assert "model" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_the_transform_uses_them(tmp_path):
    from PIL import Image

    backbone = load_from_file(f"{write(tmp_path, MODEL)}:build")
    pixel_values = backbone.transform(Image.new("L", (20, 30), 255))
    assert pixel_values.shape == (3, 16, 16)
    expected = (1 - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)
    torch.testing.assert_close(pixel_values.mean((1, 2)), expected)


def test_an_adapter_names_the_file(tmp_path):
    spec = f"{write(tmp_path, MODEL)}:build"
    model = load_classifier(load_from_file(spec), 2).model
    adapted = get_peft_model(model, MaskConfig(target_modules="all-conv", modules_to_save=["head"]))
    assert adapted.peft_config["default"].base_model_name_or_path == spec


def test_without_settings_imagenets_are_taken_and_said(tmp_path):
    spec = f"{write(tmp_path, with_build('return Net()'))}:other"
    with pytest.warns(UserWarning, match=r"does not say its model's mean, std, image_size: ImageNet's"):
        backbone = load_from_file(spec)
    assert (backbone.image_size, backbone.mean) == (224, (0.485, 0.456, 0.406))


def test_a_timm_models_record_counts(tmp_path):
    text = (
        "import timm\ndef build():\n    return timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=1, "
        "img_size=32)\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        backbone = load_from_file(f"{write(tmp_path, text)}:build")
    assert (backbone.image_size, backbone.feature_dim, backbone.mean) == (32, 192, (0.5, 0.5, 0.5))


def test_a_whole_backbone_comes_back(tmp_path):
    text = "from smn_peft.backbones import load_backbone\n\ndef build():\n    "
    text += "return load_backbone('resnet18', pretrained=False, image_size=64)\n"
    spec = f"{write(tmp_path, text)}:build"
    backbone = load_from_file(spec)
    assert (backbone.name, backbone.model.name_or_path) == (spec, spec)
    assert (backbone.image_size, backbone.feature_dim) == (64, 512)


def test_what_lies_beside_the_file_can_be_imported(tmp_path):
    write(tmp_path, MODEL, "beside_smn_test.py")
    spec = f"{write(tmp_path, 'from beside_smn_test import build')}:build"
    assert load_from_file(spec).feature_dim == 8


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "other must return an nn.Module or a Backbone; it returned None: does it lack a return?"),
        ("return Net", "it returned a type"),
        ("raise KeyError('weights')", "other raises KeyError: 'weights'"),
        ("raise SystemExit('set DATA first')", "other exits: set DATA first"),
        ("return nn.Linear(5, 2)", "does not take images of 224 pixels: "),
        ("return nn.Conv1d(3, 4, 1)", "does not take images of 224 pixels: "),
        ("m = Net(); m.mean = 0.5; return m", "mean must be three numbers"),
        ("m = Net(); m.std = (1, 0, 1); return m", "std must be three numbers between 1e-06 and 1e6"),
        ("m = Net(); m.image_size = (32, 32); return m", "image_size must be a number of pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say its model's")
def test_what_is_wrong_with_the_model(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        load_from_file(f"{write(tmp_path, with_build(body))}:other")


def test_what_is_wrong_with_the_name(tmp_path):
    path = write(tmp_path, MODEL)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.py"):
        load_from_file(f"{tmp_path}/absent.py:build")
    with pytest.raises(ValueError, match=r"has no function 'biuld' \(it has Sizes, Net, build\)"):
        load_from_file(f"{path}:biuld")
    for spec in (path, f"{path}:", "resnet18", f"{path}:a b"):
        with pytest.raises(ValueError, match="names no function in a Python file: name it as"):
            load_from_file(spec)
    with pytest.raises(ValueError, match=r"broken\.py raises SyntaxError"):
        load_from_file(f"{write(tmp_path, 'def build(:', 'broken.py')}:build")
    with pytest.raises(ValueError, match=r"broken\.py raises ModuleNotFoundError: No module named 'nowhere_at_all'"):
        load_from_file(f"{write(tmp_path, 'import nowhere_at_all', 'broken.py')}:build")
    assert not [name for name in sys.modules if name.startswith("broken_")]


def test_which_names_mean_a_file():
    assert is_file_spec("a/model.py:build")
    assert is_file_spec("model.py")
    assert not is_file_spec("timm/resnet18.a1_in1k")
    assert not is_file_spec("vit.pyramid")


def test_the_small_scale_s_own_backbone(assets):
    backbone = load_from_file(f"{ROOT / 'smn_peft/paper/small_resnet.py'}:build")
    assert (backbone.feature_dim, backbone.image_size) == (1024, 48)
    assert backbone.mean == (0.485, 0.456, 0.406)
