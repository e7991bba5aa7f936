# SPDX-License-Identifier: Apache-2.0
"""The application as a user starts it: `python -m smn_peft.cli`, the entry point, version and help."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

from typer.testing import CliRunner

import smn_peft
from smn_peft.cli.main import COMMANDS, app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_as_a_module_in_a_process():
    command = [sys.executable, "-m", "smn_peft.cli", "targets", "resnet18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "masked: 11,166,912 of 11,176,512 parameters" in done.stdout


def test_the_entry_point_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["smn"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_version_and_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout == f"smn_peft {smn_peft.__version__}\n"
    help_text = runner.invoke(app, ["--help"]).stdout
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        assert name in help_text
        assert runner.invoke(app, [name, "--help"]).exit_code == 0


def test_tab_completion():
    environ = {"_SMN_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "smn targets --mask-b"}
    result = CliRunner().invoke(app, env=environ, prog_name="smn")
    assert "--mask-bias" in result.stdout
    assert "--revision" not in result.stdout
