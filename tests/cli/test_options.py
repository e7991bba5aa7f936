# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as options: names, types and help; command line over recipe over defaults; what every mistake says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from smn_peft import MaskConfig
from smn_peft._options import merged, read_values
from smn_peft.cli.options import field_options, given
from smn_peft.training import TrainArguments


@dataclass
class Crops:
    size: int = field(default=224, metadata={"help": "Side in pixels."})
    scale: tuple[float, float] = field(default=(0.1, 1.0), metadata={"help": "Range of areas in [0, 1]."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of them."})


@dataclass
class Arguments:
    lr: float = field(default=0.5, metadata={"help": "Learning rate."})
    epochs: int = field(default=10, metadata={"help": "Passes."})
    name: str = field(default="", metadata={"help": "Name of the run."})
    kind: Literal["sgd", "adam"] = field(default="sgd", metadata={"help": "Optimizer."})
    decay: Literal["cosine", "linear"] | None = field(default="cosine", metadata={"help": "Schedule."})
    limit: int | None = field(default=7, metadata={"help": "Images."})
    output: Path = field(default=Path("out"), metadata={"help": "Folder."})
    targets: list[str] | str | None = field(default=None, metadata={"help": "Names or a regex."})
    layers: list[int] | int | None = field(default=None, metadata={"help": "Layers."})
    steps: tuple[int, ...] = field(default=(), metadata={"help": "Steps."})
    start: float | Literal["uniform"] = field(default=1.0, metadata={"help": "Start."})
    extra: dict[str, Any] = field(default_factory=dict, metadata={"help": "More."})
    crops: Crops = field(default_factory=Crops, metadata={"help": "Crops."})
    internal: int = 3


@click.command()
@field_options(Arguments)
@click.pass_context
def command(context: click.Context, **_: Any) -> dict[str, Any]:
    return given(context, Arguments)


def parsed(*words: str) -> dict[str, Any]:
    return command.main(list(words), standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", {}),
        ("--lr 1e-3", {"lr": 1e-3}),
        ("--epochs 3", {"epochs": 3}),
        ("--name none", {"name": "none"}),
        ("--kind adam", {"kind": "adam"}),
        ("--decay linear", {"decay": "linear"}),
        ("--decay none", {"decay": None}),
        ("--limit 9", {"limit": 9}),
        ("--limit None", {"limit": None}),
        ("--output a/b", {"output": Path("a/b")}),
        ("--targets all-conv", {"targets": "all-conv"}),
        ("--targets a --targets b", {"targets": ["a", "b"]}),
        ("--targets none", {"targets": None}),
        ("--layers 4", {"layers": 4}),
        ("--layers 4 --layers 5", {"layers": [4, 5]}),
        ("--steps 4", {"steps": (4,)}),
        ("--steps 4 --steps 5", {"steps": (4, 5)}),
        ("--start 0.25", {"start": 0.25}),
        ("--start uniform", {"start": "uniform"}),
        ("--extra a=1 --extra b=[x,2.5]", {"extra": {"a": 1, "b": ["x", 2.5]}}),
        ("--crops.size 32", {"crops": {"size": 32}}),
        ("--crops.scale 0.2 0.3 --no-crops.flip", {"crops": {"scale": (0.2, 0.3), "flip": False}}),
        ("--crops.flip", {"crops": {"flip": True}}),
    ],
)
def test_every_type_on_the_command_line(words, value):
    got = parsed(*words.split())
    assert got == value
    assert [type(one) for one in got.values()] == [type(one) for one in value.values()]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ({"lr": "1e-3"}, {"lr": 1e-3}),
        ({"lr": 2}, {"lr": 2.0}),
        ({"decay": None}, {"decay": None}),
        ({"output": "a/b"}, {"output": Path("a/b")}),
        ({"targets": ["a"]}, {"targets": ["a"]}),
        ({"targets": "a"}, {"targets": "a"}),
        ({"targets": {"b", "a"}}, {"targets": ["a", "b"]}),
        ({"targets": ("a",)}, {"targets": ["a"]}),
        ({"steps": [1, 2]}, {"steps": (1, 2)}),
        ({"start": "uniform"}, {"start": "uniform"}),
        ({"extra": {"a": {"b": 1}}}, {"extra": {"a": {"b": 1}}}),
        ({"crops": {"scale": [0.2, 1], "flip": False}}, {"crops": {"scale": (0.2, 1.0), "flip": False}}),
    ],
)
def test_every_type_in_a_recipe(content, value):
    got = read_values(Arguments, content, "recipe.yaml")
    assert got == value
    assert [type(one) for one in got.values()] == [type(one) for one in value.values()]


def test_the_line_wins_over_the_recipe_inside_nested_values_too():
    recipe = {"lr": 0.1, "extra": {"a": 1, "b": 2}, "crops": {"size": 64, "flip": False}}
    line = {"lr": 0.2, "extra": {"b": 3}, "crops": {"flip": True}}
    assert merged(recipe, line) == {"lr": 0.2, "extra": {"a": 1, "b": 3}, "crops": {"size": 64, "flip": True}}
    assert recipe["crops"] == {"size": 64, "flip": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epohcs": 3}, "recipe.yaml: unknown option 'epohcs'. Did you mean epochs?"),
        ({"size": 3}, "unknown option 'size'."),
        ({"crops": {"sise": 3}}, "unknown option 'crops.sise'. Did you mean crops.size?"),
        ({"internal": 3}, "unknown option 'internal'"),
        ({3: 4}, "unknown option '3'."),
        ({"crops": 3}, "crops has values of its own, such as crops: {…}; got 3."),
        ({"lr": "fast"}, "recipe.yaml: lr must be float; got 'fast'."),
        ({"epochs": 1.5}, "epochs must be int; got 1.5."),
        ({"epochs": True}, "epochs must be int; got True."),
        ({"name": 3}, "name must be str; got 3."),
        ({"kind": "sdg"}, "kind must be sgd|adam; got 'sdg'."),
        ({"limit": [1]}, "limit must be int or none; got [1]."),
        ({"layers": [1, "a"]}, "layers must be list of int or int or none; got [1, 'a']."),
        ({"crops": {"scale": [1]}}, "crops.scale must be (float, float); got [1]."),
    ],
)
def test_mistakes_in_a_recipe(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_values(Arguments, content, "recipe.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs x", "Invalid value for '--epochs': must be int; got 'x'."),
        ("--epochs true", "must be int; got 'true'."),
        ("--kind sdg", "Invalid value for '--kind': must be sgd|adam; got 'sdg'."),
        ("--decay step", "must be cosine|linear or none; got 'step'."),
        ("--limit x", "must be int or none; got 'x'."),
        ("--layers x", "must be list of int or int or none; got 'x'."),
        ("--crops.scale 1 x", "must be (float, float); got '1 x'."),
        ("--extra x", "must be key=value; got 'x'."),
        ("--extra x=[", "must be key=value; got 'x=['."),
        ("--internal 3", "No such option '--internal'"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    result = CliRunner().invoke(command, words.split())
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_and_defaults_are_the_fields():
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for part in ("Range of areas in [0, 1]. [(0.1, 1.0)]", "Side in pixels. [224]", "Optimizer.", "--no-crops.flip"):
        assert part in text
    assert "internal" not in text


def test_a_mask_of_the_line_is_a_mask_config():
    @click.command()
    @field_options(TrainArguments)
    @click.pass_context
    def train(context: click.Context, **_: Any) -> TrainArguments:
        return TrainArguments(**given(context, TrainArguments))

    line = "--backbone b --dataset d --mask.batch-norm adapt --mask.init-score 0.5 --mask.target-modules .*fc"
    got = train.main(line.split(), standalone_mode=False)
    assert got.mask == MaskConfig(batch_norm="adapt", init_score=0.5, target_modules=".*fc")
    with pytest.raises(ValueError, match="density and density_schedule belong to mask_type='topk'"):
        train.main([*line.split(), "--mask.density", "0.5"], standalone_mode=False)
