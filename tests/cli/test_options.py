# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as options: names, types and help; command line over recipe over defaults; what every mistake says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from smn_peft import MaskConfig
from smn_peft.cli.errors import ErrorGroup
from smn_peft.cli.options import build, fields_of, with_options
from smn_peft.training.recipes import read_recipe

runner = CliRunner()


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
    layers: list[int] = field(default_factory=list, metadata={"help": "Layers."})
    steps: tuple[int, ...] = field(default=(), metadata={"help": "Steps."})
    start: float | Literal["uniform"] = field(default=1.0, metadata={"help": "Start."})
    extra: dict[str, Any] = field(default_factory=dict, metadata={"help": "More."})
    crops: Crops = field(default_factory=lambda: Crops(size=96), metadata={"help": "Crops."})
    internal: int = 3

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {self.epochs}.")


@dataclass
class Needed:
    data: str = field(metadata={"help": "Data set."})


@dataclass
class Config:
    mask: MaskConfig = field(default_factory=MaskConfig, metadata={"help": "Mask."})


def invoke(*args: str, recipe: bool = True, kind: type = Arguments) -> Any:
    """The dataclass that the command gets, or typer's result where it fails."""
    got = []

    def command(arguments, word: str = "word"):
        got.append(arguments)

    command.__annotations__ = {"arguments": kind, "word": str}
    app = typer.Typer(cls=ErrorGroup)
    app.callback()(lambda: None)
    app.command("go")(with_options(recipe=read_recipe if recipe else None)(command))
    result = runner.invoke(app, ["go", *args])
    if result.exit_code:
        return result
    return got[0] if got else result


def fails(code: int, message: str, *args: str, **options: Any) -> None:
    result = invoke(*args, **options)
    text = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))
    assert result.exit_code == code, text
    assert message in text


def write(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def test_without_options_the_defaults():
    assert invoke() == Arguments()


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--epochs", "3"], "epochs", 3),
        (["--name", "none"], "name", "none"),
        (["--kind", "adam"], "kind", "adam"),
        (["--decay", "linear"], "decay", "linear"),
        (["--decay", "none"], "decay", None),
        (["--limit", "9"], "limit", 9),
        (["--limit", "None"], "limit", None),
        (["--output", "a/b"], "output", Path("a/b")),
        (["--targets", "all-conv"], "targets", "all-conv"),
        (["--targets", "a", "--targets", "b"], "targets", ["a", "b"]),
        (["--targets", "none"], "targets", None),
        (["--layers", "4"], "layers", [4]),
        (["--layers", "4", "--layers", "5"], "layers", [4, 5]),
        (["--steps", "4", "--steps", "5"], "steps", (4, 5)),
        (["--start", "0.25"], "start", 0.25),
        (["--start", "uniform"], "start", "uniform"),
        (["--extra", "a=1", "--extra", "b=[x, 2.5]"], "extra", {"a": 1, "b": ["x", 2.5]}),
        (["--crops.size", "32"], "crops", Crops(size=32)),
        (["--crops.scale", "0.2", "0.3"], "crops", Crops(size=96, scale=(0.2, 0.3))),
        (["--no-crops.flip"], "crops", Crops(size=96, flip=False)),
        (["--crops.flip"], "crops", Crops(size=96, flip=True)),
    ],
)
def test_every_type_on_the_command_line(args, name, value):
    got = getattr(invoke(*args), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 2", "lr", 2.0),
        ("decay: null", "decay", None),
        ("output: a/b", "output", Path("a/b")),
        ("targets: [a]", "targets", ["a"]),
        ("targets: a", "targets", "a"),
        ("steps: [1, 2]", "steps", (1, 2)),
        ("start: uniform", "start", "uniform"),
        ("extra: {a: {b: 1}}", "extra", {"a": {"b": 1}}),
        ("crops: {scale: [0.2, 1], flip: false}", "crops", Crops(size=96, scale=(0.2, 1.0), flip=False)),
    ],
)
def test_every_type_in_a_recipe(tmp_path, text, name, value):
    got = getattr(invoke("--recipe", write(tmp_path, text)), name)
    assert got == value
    assert type(got) is type(value)


def test_the_command_line_wins_over_the_recipe_over_the_defaults(tmp_path):
    recipe = write(tmp_path, "lr: 0.1\nepochs: 20\ndecay: linear\nextra: {a: 1, b: 2}\ncrops: {size: 64, flip: false}")
    got = invoke("--lr", "0.2", "--crops.flip", "--decay", "none", "--extra", "b=3", "--recipe", recipe)
    assert got == Arguments(lr=0.2, epochs=20, decay=None, extra={"a": 1, "b": 3}, crops=Crops(size=64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3", "recipe.yaml: unknown key 'epohcs'; did you mean epochs?"),
        ("size: 3", "unknown key 'size'; did you mean crops.size?"),
        ("crops: {sise: 3}", "unknown key 'crops.sise'; did you mean crops.size"),
        ("internal: 3", "unknown key 'internal'"),
        ("3: 4", "unknown key '3'."),
        ("crops: 3", "crops has values of its own, such as crops: {…}; got 3."),
        ("lr: fast", "recipe.yaml: lr must be float; got 'fast'."),
        ("epochs: 1.5", "epochs must be int; got 1.5."),
        ("epochs: true", "epochs must be int; got True."),
        ("name: 3", "name must be str; got 3."),
        ("kind: sdg", "kind must be sgd|adam; got 'sdg'."),
        ("limit: [1]", "limit must be int or none; got [1]."),
        ("layers: [1, a]", "layers[1] must be int; got 'a'."),
        ("crops: {scale: [1]}", "crops.scale must be (float, float); got [1]."),
        ("- 3", "must hold a mapping, such as 'epochs: 10'; it holds list."),
        ("", "must hold a mapping"),
        ("a: [", "is not a YAML file"),
        ("epochs: 0", "epochs must be at least 1; got 0."),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, text, message):
    fails(1, message, "--recipe", write(tmp_path, text))


def test_a_recipe_that_is_not_there():
    fails(1, "error: No such file or directory: absent.yaml", "--recipe", "absent.yaml")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "x"], "--epochs"),
        (["--kind", "sdg"], "--kind"),
        (["--decay", "step"], "must be cosine|linear or none; got 'step'"),
        (["--limit", "x"], "must be int or none; got 'x'"),
        (["--layers", "x"], "must be int; got 'x'"),
        (["--extra", "x"], "must be key=value; got 'x'"),
        (["--extra", "x=["], "the value in YAML"),
        (["--internal", "3"], "--internal"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    fails(2, message, *args)


def test_what_the_dataclass_refuses_is_an_error():
    fails(1, "error: epochs must be at least 1; got 0.", "--epochs", "0")


def test_what_has_no_default_must_be_said(tmp_path):
    fails(2, "--data: is missing, and no recipe gives it", kind=Needed)
    assert invoke("--recipe", write(tmp_path, "data: x"), kind=Needed) == Needed("x")
    assert invoke("--data", "x", kind=Needed) == Needed("x")


def test_help_and_defaults_are_the_fields(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("--help")
    text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))
    for field_ in fields_of(Arguments):
        assert field_.flag in text
        assert field_.help in text
    assert "Range of areas in [0, 1]." in text  # not taken for markup
    assert "(96)" in text
    assert "--internal" not in text


def test_a_mask_config_has_our_fields_and_not_pefts():
    names = {field_.path for field_ in fields_of(Config)}
    assert {"mask.target_modules", "mask.density", "mask.batch_norm"} <= names
    assert not {"mask.peft_type", "mask.auto_mapping", "mask.inference_mode", "mask.revision"} & names
    got = invoke(
        "--mask.batch-norm", "adapt", "--mask.init-score", "0.5", "--mask.target-modules", ".*fc", kind=Config
    )
    assert got.mask == MaskConfig(batch_norm="adapt", init_score=0.5, target_modules=".*fc")
    fails(1, "density and density_schedule belong to mask_type='topk'", "--mask.density", "0.5", kind=Config)


def test_build_keeps_what_a_nested_default_says():
    assert build(Arguments, {"crops.flip": False}).crops == Crops(size=96, flip=False)


def test_only_some_fields_and_clashes():
    def command(arguments: Arguments, lr: float) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="Two parameters of command are called 'lr'"):
        with_options()(command)
    with_options(hidden=["lr"])(command)
    with pytest.raises(TypeError, match="command has no fields crops, nothing"):
        with_options(only=["epochs", "crops", "nothing"])(command)


def test_choices_of_an_optional_literal_are_completed():
    app = typer.Typer()
    app.callback()(lambda: None)

    def command(arguments: Arguments) -> None:
        raise AssertionError

    command.__annotations__ = {"arguments": Arguments}
    app.command("go")(with_options()(command))
    environ = {"_SMN_COMPLETE": "complete_bash", "COMP_WORDS": "smn go --decay l", "COMP_CWORD": "3"}
    assert runner.invoke(app, env=environ, prog_name="smn").stdout.split() == ["linear"]
