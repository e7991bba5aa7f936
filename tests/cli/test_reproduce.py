# SPDX-License-Identifier: Apache-2.0
"""`smn reproduce`: the list, mistakes, and what is missing said in one line."""

from __future__ import annotations

from typer.testing import CliRunner

from smn_peft.cli.main import app


def smn_reproduce(*words: str, code: int = 0):
    result = CliRunner().invoke(app, ["reproduce", *words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.stderr.split())


def test_the_list_names_all():
    text = smn_reproduce("--list")
    for name in ("table1", "table2", "table10", "figure3", "figure9", "ablations"):
        assert f"| {name} " in text
    assert "two CPU cores" in text


def test_mistakes(monkeypatch, tmp_path):
    monkeypatch.delenv("SMN_ASSETS", raising=False)
    assert "name a table or figure" in smn_reproduce(code=2)
    assert "Did you mean table2?" in smn_reproduce("tabl2", code=1)
    assert "There is no scale 'tiny'" in smn_reproduce("table2", "--scale", "tiny", code=1)
    missing = smn_reproduce("table2", "--output", str(tmp_path), code=1)
    assert missing.startswith("error: table2 at scale 'small': SMN_ASSETS is unset: it names the folder with")
