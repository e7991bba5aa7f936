# SPDX-License-Identifier: Apache-2.0
"""`examples/nano_smn.py` is the method written out: the package learns the same masks from one seed, to the bit."""

from __future__ import annotations

import ast
import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from smn_peft import MaskConfig

from .processes import ROOT

SCRIPT = ROOT / "examples/nano_smn.py"
LAYERS = ("conv1", "conv2", "fc")


@pytest.fixture(scope="module")
def nano() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("nano_smn", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(nano: ModuleType, model: Any, scores: list[torch.Tensor], head: list[torch.Tensor]) -> None:
    images, labels, _, _ = nano.digits(5)
    torch.manual_seed(1)
    nano.train(model, [{"params": scores, "lr": 50.0}, {"params": head, "lr": 0.05}], images, labels, epochs=4)


def test_it_is_short_and_stands_alone() -> None:
    source = SCRIPT.read_text("utf-8")
    assert len(source.splitlines()) <= 150
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not [name for name in imported if name.split(".")[0] in ("smn_peft", "peft")]


def test_the_package_learns_the_same_masks(nano: ModuleType, tmp_path: Path) -> None:
    base = nano.network()
    masked = copy.deepcopy(base)
    for name in LAYERS:
        setattr(masked, name, nano.Masked(getattr(masked, name)))
    train(nano, masked, [getattr(masked, name).scores for name in LAYERS], list(masked.head.parameters()))
    nano.save(masked, tmp_path / "nano.safetensors")

    model: Any = get_peft_model(base, MaskConfig(target_modules=list(LAYERS), modules_to_save=["head"]))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    train(nano, model, [p for name, p in named if "smn_" in name], [p for name, p in named if "smn_" not in name])
    model.save_pretrained(tmp_path / "package", save_embedding_layers=False)

    ours = load_file(tmp_path / "package/adapter_model.safetensors")
    theirs = load_file(tmp_path / "nano.safetensors")
    for name in LAYERS:
        bits = theirs[f"{name}.smn_mask"]
        assert (bits != 255).any(), f"{name} learned nothing"
        assert torch.equal(bits, ours[f"base_model.model.{name}.smn_mask"]), name


def test_a_saved_mask_loads_to_the_bit(nano: ModuleType, tmp_path: Path) -> None:
    base = nano.network()
    masked = copy.deepcopy(base)
    for name in LAYERS:
        setattr(masked, name, nano.Masked(getattr(masked, name)))
        getattr(masked, name).scores.data.normal_()
    nano.save(masked, tmp_path / "nano.safetensors")
    x = nano.digits(5)[2]
    with torch.no_grad():
        assert torch.equal(nano.load(base, tmp_path / "nano.safetensors")(x), masked(x))
