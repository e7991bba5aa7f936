# SPDX-License-Identifier: Apache-2.0
"""`smn targets` prints explain_targets' report, for a library's model and for a user's file."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from smn_peft import MaskConfig, explain_targets
from smn_peft.backbones import load_backbone
from smn_peft.cli import app

runner = CliRunner()

MODEL = """
from torch import nn

def build():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    model.mean, model.std, model.image_size = (0, 0, 0), (1, 1, 1), 16
    return model
"""


def run(*args: str, code: int = 0):
    result = runner.invoke(app, ["targets", *args])
    assert result.exit_code == code, result.output
    return result


def test_the_report_of_a_timm_model():
    expected = explain_targets(load_backbone("resnet18", pretrained=False).model, verbose=False)
    assert run("resnet18").stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--target-modules", "all-linear", "--mask-bias"], MaskConfig(target_modules="all-linear", mask_bias=True)),
        (["--layers-to-transform", "0", "--image-size", "32"], MaskConfig(layers_to_transform=[0])),
        (
            ["--target-modules", "fc1", "--target-modules", "fc2", "--exclude-modules", r".*\.11\..*"],
            MaskConfig(target_modules=["fc1", "fc2"], exclude_modules=r".*\.11\..*"),
        ),
    ],
)
def test_options_are_mask_configs(options, config):
    size = 32 if "--image-size" in options else None
    model = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=size).model
    expected = explain_targets(model, config, verbose=False)
    assert 0 < expected.masked_weights < explain_targets(model, verbose=False).masked_weights or config.mask_bias
    assert run("vit_tiny_patch16_224", *options).stdout == f"{expected}\n"


def test_a_users_file(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    spec = f"{tmp_path / 'model.py'}:build"
    assert "masked: 792 of 800 parameters" in run(spec, "--target-modules", "all-conv").stdout
    nothing = run(spec, code=1)
    assert "has no default target modules" in nothing.stdout
    assert nothing.stderr.startswith("error: Nothing would be masked: see the last column")
    wrong = run(spec, "--image-size", "32", code=1)
    assert "are for libraries' models, not for" in wrong.stderr


def test_mistakes():
    assert "Did you mean resnet18" in run("resnet18x", code=1).stderr
    assert "There is no file absent.py" in run("absent.py:build", code=1).stderr
    assert "has no effect without layers_to_transform" in run("resnet18", "--layers-pattern", "x", code=1).stderr
    run("resnet18", "--mask-baiss", code=2)
    run(code=2)
