# SPDX-License-Identifier: Apache-2.0
"""`smn` as a user starts it: version, help, completion, wrong usage, and how a command fails."""

from __future__ import annotations

import errno
import sys
import warnings
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import smn_peft
from smn_peft.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()


def smn(*words: object, code: int = 0):
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_the_entry_point_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["smn"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_version_and_help():
    assert smn("--version").stdout == f"smn_peft {smn_peft.__version__}\n"
    text = smn("--help").stdout
    for name, command in app.commands.items():
        assert f"\n  {name} " in text
        smn(name, "--help")
        for inner in getattr(command, "commands", ()):
            smn(name, inner, "--help")


def test_train_shows_what_people_use_and_everything_if_asked():
    short, whole = smn("train", "--help").stdout, smn("train", "--help-all").stdout
    assert len(short.splitlines()) < 70
    for option in ("--backbone", "--dataset", "--recipe", "--lr", "--tasks", "--launch", "--help-all"):
        assert option in short
    for option in ("--mask.density", "--multi-crop.local-crops", "--momentum", "--no-mask.scale"):
        assert option not in short
        assert option in whole
    for option in ("--mask.peft-type", "--mask.inference-mode", "--mask.base-fingerprint"):
        assert option not in whole


def test_tab_completion():
    environ = {"_SMN_COMPLETE": "bash_complete", "COMP_WORDS": "smn targets --mask-b", "COMP_CWORD": "2"}
    result = runner.invoke(app, env=environ)
    assert "--mask-bias" in result.stdout
    assert "--revision" not in result.stdout
    environ = {"_SMN_COMPLETE": "bash_complete", "COMP_WORDS": "smn train --optimizer a", "COMP_CWORD": "3"}
    assert runner.invoke(app, env=environ).stdout.split() == ["plain,adamw"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "No such command 'tran'. Did you mean 'train'?"),
        (["--wrong"], "No such option '--wrong'."),
        (["targets", "resnet18", "--mask-baiss"], "'--mask-bias'"),
        (["serve", ".", "--base", "none", "--port", "99999"], "Invalid value for '--port'"),
        (["serve", ".", "--base", "none", "--max-batch", "0"], "max_batch must be at least 1; got 0."),
        (["serve", ".", "--base", "none", "--queue", "0"], "queue must be at least 1; got 0."),
        (
            ["serve", ".", "--base", "none", "--max-wait-ms", "-1"],
            "max_wait_ms must be at least 0 and at most 60000; got -1.0.",
        ),
        (["serve", ".", "--base", "none", "--timeout", "nan"], "timeout must be at least 0.001"),
        (["serve", "."], "Missing option '--base'."),
        (["reproduce"], "name a table or figure"),
    ],
)
def test_wrong_usage_is_one_line(words, message):
    said = smn(*words, code=2).stderr
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_reproduce(monkeypatch, tmp_path):
    text = smn("reproduce", "--list").stdout
    for name in ("table1", "table2", "table10", "figure3", "figure9", "ablations"):
        assert f"| {name} " in text
    assert "two CPU cores" in text
    monkeypatch.delenv("SMN_ASSETS", raising=False)
    assert "Did you mean table2?" in smn("reproduce", "tabl2", code=1).stderr
    assert "There is no scale 'tiny'" in smn("reproduce", "table2", "--scale", "tiny", code=1).stderr
    missing = smn("reproduce", "table2", "--output", tmp_path, code=1).stderr
    assert missing.startswith("error: table2 at scale 'small': SMN_ASSETS is unset: it names the folder with")


def application(error: BaseException | None = None) -> click.Group:
    """A group like `smn` with one command, which fails."""

    @click.group(cls=type(app))
    def group() -> None:
        pass

    @group.command()
    @click.option("--word")
    def go(word: str) -> None:
        click.echo(warnings.formatwarning("take care", UserWarning, "a.py", 3), nl=False)
        click.echo(warnings.formatwarning("soon", FutureWarning, "a.py", 3), nl=False)
        if error is not None:
            raise error

    return group


def test_a_warning_is_one_line_and_python_keeps_its_own():
    python = warnings.formatwarning
    said = runner.invoke(application(), ["go"]).stdout
    assert said.startswith("warning: take care\n")
    assert "a.py:3: FutureWarning" in said
    assert warnings.formatwarning is python


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad value:\n  take another"), "bad value: take another"),
        (RuntimeError("no memory"), "no memory"),
        (ImportError("pip install x"), "pip install x"),
        (OSError("not in the cache"), "not in the cache"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.npz"), "No such file or directory: a.npz"),
        (ValueError(), "ValueError"),
    ],
)
def test_expected_errors_are_one_line(error, line):
    result = runner.invoke(application(error), ["go"])
    assert result.exit_code == 1
    assert result.stderr == f"error: {line} (in full with --traceback)\n"


@pytest.mark.parametrize("args", [["--traceback", "go"], ["go", "--traceback"], ["go", "--traceback", "--word", "x"]])
def test_traceback_shows_where(args):
    result = runner.invoke(application(ValueError("bad value")), args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "raise error" in result.stderr
    assert result.stderr.endswith("ValueError: bad value\n")


def test_a_bug_is_not_hidden_and_ctrl_c_ends_with_130():
    assert isinstance(runner.invoke(application(TypeError("a bug")), ["go"]).exception, TypeError)
    interrupted = runner.invoke(application(KeyboardInterrupt()), ["go"])
    assert interrupted.exit_code == 130
    assert "Traceback" not in interrupted.output
    assert runner.invoke(application(click.exceptions.Exit(7)), ["go"]).exit_code == 7
