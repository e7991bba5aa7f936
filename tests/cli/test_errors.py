# SPDX-License-Identifier: Apache-2.0
"""How a command fails: one line and its exit code, in full with --traceback."""

from __future__ import annotations

import errno
import warnings

import pytest
import typer
from typer.testing import CliRunner

from smn_peft.cli.errors import ErrorGroup, _short_warnings, one_line

runner = CliRunner()


def application(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=ErrorGroup, pretty_exceptions_enable=False)

    @app.callback()
    def common() -> None:
        pass

    @app.command()
    def go(word: str = "") -> None:
        typer.echo(word)
        raise error

    return app


def test_a_warning_is_one_line_and_python_keeps_its_own():
    python = warnings.formatwarning
    with _short_warnings():
        assert warnings.formatwarning("take care", UserWarning, "a.py", 3) == "warning: take care\n"
        assert "a.py:3: FutureWarning" in warnings.formatwarning("soon", FutureWarning, "a.py", 3)
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
    assert one_line(error) == line


@pytest.mark.parametrize("args", [["--traceback", "go"], ["go", "--traceback"], ["go", "--traceback", "--word", "x"]])
def test_traceback_shows_where(args):
    result = runner.invoke(application(ValueError("bad value")), args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "raise error" in result.stderr
    assert result.stderr.endswith("ValueError: bad value\n")


def test_a_bug_is_not_hidden():
    result = runner.invoke(application(TypeError("a bug")), ["go"])
    assert isinstance(result.exception, TypeError)


def test_usage_errors_ways_out_and_ctrl_c():
    assert runner.invoke(application(ValueError()), ["og"]).exit_code == 2
    assert runner.invoke(application(ValueError()), ["go", "--wrod", "x"]).exit_code == 2
    assert runner.invoke(application(typer.Exit(7)), ["go"]).exit_code == 7
    interrupted = runner.invoke(application(KeyboardInterrupt()), ["go"])
    assert interrupted.exit_code == 130
    assert "Traceback" not in interrupted.output
