# SPDX-License-Identifier: Apache-2.0
"""Adapters of every released format still load: what is in `fixtures` was written once and is never written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from smn_peft.storage.adapter_config import FORMAT_VERSION
from smn_peft.storage.adapter_file import WEIGHTS_NAME

FIXTURES = Path(__file__).with_name("fixtures")
SHAPES = {"stem": (4, 1, 3, 3), "block.conv": (6, 4, 3, 3), "head_in": (5, 6)}


def base() -> nn.Module:
    """The model that the fixtures belong to; its weights are exact binary fractions, the same everywhere."""
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(1, 4, 3, bias=False))
    model.add_module("norm", nn.BatchNorm2d(4))
    model.add_module("block", nn.Sequential())
    model.block.add_module("conv", nn.Conv2d(4, 6, 3))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head_in", nn.Linear(6, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.arange(parameter.numel()) * 37 % 64 - 31
            parameter.copy_(values.reshape(parameter.shape) / 64)
    return model


def expected_mask(name: str) -> torch.Tensor:
    """The mask that the fixture holds, by a rule that has nothing to do with the code that wrote it."""
    size = torch.Size(SHAPES[name])
    return (torch.arange(size.numel()) * 7 % 5 != len(name) % 5).reshape(size)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_the_fixture_loads_bit_for_bit_and_saves_as_the_same_bytes(version, tmp_path):
    folder = FIXTURES / f"format_{version}"
    model = PeftModel.from_pretrained(base(), folder).eval()
    masks = model.masks()
    assert {name.removesuffix(".weight") for name in masks} == set(SHAPES)
    for name in SHAPES:
        assert torch.equal(masks[f"{name}.weight"], expected_mask(name))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_every_format_has_a_fixture():
    assert sorted(path.name for path in FIXTURES.glob("format_*")) == [
        f"format_{version}" for version in range(1, FORMAT_VERSION + 1)
    ]


def test_the_coded_fixture_loads_bit_for_bit(tmp_path):
    """Layout 1 of coded masks. What is saved again is compared as masks: zlib's builds write different bytes."""
    model = PeftModel.from_pretrained(base(), FIXTURES / "coded_1").eval()
    assert model.peft_config["default"].codec == "entropy"
    for folder in ("once", "twice"):
        for name in SHAPES:
            assert torch.equal(model.masks()[f"{name}.weight"], expected_mask(name))
        model.save_pretrained(tmp_path / folder)
        model = PeftModel.from_pretrained(base(), tmp_path / folder).eval()
    assert (tmp_path / "once" / WEIGHTS_NAME).read_bytes() == (tmp_path / "twice" / WEIGHTS_NAME).read_bytes()
