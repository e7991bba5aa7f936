# SPDX-License-Identifier: Apache-2.0
"""`smn serve`: values out of range are wrong usage, said before a model is loaded."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from smn_peft.cli.main import app

runner = CliRunner()


@pytest.mark.parametrize(
    ("option", "value"), [("--port", 99999), ("--max-batch", 0), ("--queue", 0), ("--max-wait-ms", -1)]
)
def test_values_out_of_range(option, value, tmp_path):
    result = runner.invoke(app, ["serve", str(tmp_path), "--base", "none", option, str(value)])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr
