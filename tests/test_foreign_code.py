# SPDX-License-Identifier: Apache-2.0
"""No program runs because a file names it: not a base, not an objective, not a kernel, wherever the program lies."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

import smn_peft
from smn_peft.backbones import load_backbone, name_read_from
from smn_peft.cli import app
from smn_peft.training import load_masks, load_recipe, load_run
from smn_peft.training.arguments import absolute
from tests.hub.folders import write_run

PROGRAM = """
import pathlib
pathlib.Path({marker!r}).touch()
import torch
from torch import nn

class Model(nn.Sequential):
    def forward(self, pixel_values):
        return super().forward(pixel_values.flatten(1)[:, :32])

def build():
    torch.manual_seed(0)
    model = Model(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    model.mean, model.std, model.image_size = (0.5,) * 3, (0.5,) * 3, 4
    return model
"""
PLACES = ("inside", "deeper", "beside", "linked", "elsewhere", "relative")


@pytest.fixture
def marker(tmp_path) -> Path:
    """Exists once the program has run."""
    return tmp_path / "it_ran"


def put(folder: Path, place: str, marker: Path, monkeypatch) -> str:
    """Write the program to a place that a record in `folder` can name; returns that name."""
    where = {"inside": folder, "deeper": folder / "src", "relative": folder, "linked": folder.parent / "real"}
    directory = where.get(place, folder.parent)
    directory.mkdir(exist_ok=True)
    file = directory / "base.py"
    file.write_text(PROGRAM.format(marker=str(marker)))
    if place == "linked":
        os.symlink(file, folder / "link.py")
        file = folder / "link.py"
    if place == "relative":  # a clone, used from where it lies
        monkeypatch.chdir(folder)
        return "base.py:build"
    return f"{file}:build"


def name(folder: Path, record: str, spec: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    if record == "adapter_config.json":
        (folder / "run.json").unlink()
        (folder / record).write_text(json.dumps({**config, "base_model_name_or_path": spec}))
        return
    facts = json.loads((folder / record).read_text())
    facts["arguments"]["backbone"] = spec
    (folder / record).write_text(json.dumps(facts))


@pytest.mark.parametrize("record", ["adapter_config.json", "run.json"])
@pytest.mark.parametrize("place", PLACES)
def test_a_base_that_a_record_names(tmp_path, monkeypatch, marker, record, place):
    folder = tmp_path / "repo"
    write_run(folder)
    spec = put(folder, place, marker, monkeypatch)
    name(folder, record, spec)
    for load in (load_run, load_masks):
        with pytest.raises(ValueError, match=rf"{record} names .*a program, which is run only if you name it"):
            load(folder)
    assert not marker.exists()
    assert load_run(folder, backbone=spec)[1].name in (spec, absolute(spec))
    assert marker.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["verify"],
        ["eval"],
        ["analyze", "density"],
        ["analyze", "similarity"],
        ["analyze", "embedding", "--plot", "x.png"],
        ["pack", "--base", "-o", "out"],
        ["unpack", "--base", "-o", "out"],
    ],
    ids=" ".join,
)
def test_every_command_that_loads_a_base(tmp_path, monkeypatch, marker, words):
    folder = tmp_path / "repo"
    write_run(folder)
    name(folder, "run.json", put(folder, "inside", marker, monkeypatch))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words, str(folder)])
    assert result.exit_code == 1
    assert "run only if you name it yourself" in result.output
    assert "--backbone" in result.output
    assert not marker.exists()


def test_an_objective_that_a_run_names(tmp_path, monkeypatch, marker):
    folder = tmp_path / "repo"
    write_run(folder, backbone="test_vit", pretrained=False, dataset=str(tmp_path / "none.npz"), eval_split="test")
    spec = put(folder, "inside", marker, monkeypatch).replace(":build", ":mine")
    facts = json.loads((folder / "run.json").read_text())
    facts["arguments"] |= {"objective": spec, "adapt": "full"}
    (folder / "run.json").write_text(json.dumps(facts))
    arguments, _ = load_run(folder, base=True)
    assert arguments.objective == "mine"
    CliRunner().invoke(app, ["analyze", "embedding", str(folder), "--base", "--plot", str(tmp_path / "x.png")])
    CliRunner().invoke(app, ["eval", str(folder), "--base", "--cpu"])
    assert not marker.exists()


@pytest.mark.parametrize("key", ["backbone", "objective"])
@pytest.mark.parametrize("nested", [False, True], ids=["recipe", "tasks"])
def test_what_a_recipe_names(tmp_path, monkeypatch, marker, key, nested):
    spec = put(tmp_path, "inside", marker, monkeypatch)
    path = tmp_path / "mine.yaml"
    content = {key: spec, "max_steps": 1}
    path.write_text(json.dumps({"one": content} if nested else content))
    line = ["train", "--tasks" if nested else "--recipe", str(path), "--dataset", "cifar10", "--output-dir", "out"]
    line += [] if key == "backbone" and not nested else ["--backbone", "test_vit"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert f"take it out there, and add --{key}" in result.output
    if not nested:
        with pytest.raises(ValueError, match="a program, which is run only if you name it yourself"):
            load_recipe(path)
    assert not marker.exists()


def test_what_is_no_program_passes():
    for known in ("resnet18", "timm/resnet18.a1_in1k", "/models/vit", ""):
        assert name_read_from("run.json", known) == known


def auto_calls(tree: ast.AST) -> list[ast.Call]:
    """Calls of `from_pretrained` or `from_config` on an Auto class, or on a name that one was given to."""
    autos = {"AutoModel"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _is_auto(node.value, set()):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            autos |= {target.id for target in targets if isinstance(target, ast.Name)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and _is_auto(node.func.value, autos)
    ]


def _is_auto(node: ast.AST, known: set[str]) -> bool:
    found = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return found in known or (found.startswith("Auto") and not found.startswith("AutoPeft"))


def untrusting(call: ast.Call) -> bool:
    return any(
        word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in call.keywords
    )


def test_every_auto_class_is_told_to_trust_no_code():
    root = Path(smn_peft.__file__).parent
    calls = {path: auto_calls(ast.parse(path.read_text("utf-8"))) for path in root.rglob("*.py")}
    assert sum(map(len, calls.values())) >= 3
    assert [f"{path}:{call.lineno}" for path, found in calls.items() for call in found if not untrusting(call)] == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained('a')",
        "transformers.AutoConfig.from_pretrained('a', trust_remote_code=True)",
        "auto = transformers.AutoTokenizer\nauto.from_pretrained('a', trust_remote_code=flag)",
    ],
)
def test_the_walk_would_find_one(source):
    (call,) = auto_calls(ast.parse(source))
    assert not untrusting(call)


def saved_vit(folder: Path, **changes: object) -> Path:
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}},
        {"attn_implementation": "user/kernel"},
        {"_attn_implementation": "user/kernel"},
    ],
    ids=["auto_map", "kernel", "internal"],
)
def test_a_folder_of_a_model_brings_no_code(tmp_path, marker, changes):
    folder = saved_vit(tmp_path / "vit", **changes)
    (folder / "code.py").write_text(PROGRAM.format(marker=str(marker)))
    with pytest.raises(ValueError, match=r"trust_remote_code|is not run"):
        load_backbone(folder)
    assert not marker.exists()
