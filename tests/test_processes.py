# SPDX-License-Identifier: Apache-2.0
"""A forked process is as good as a fresh one: its own modules, folder, arguments, output and exit code."""

from __future__ import annotations

import sys

import peft

import smn_peft

from .processes import run_python

SCRIPT = """
import os, sys
import beside, peft, smn_peft
print(beside.WORD, sys.argv[1:], os.getcwd())
print("SMN" in peft.PeftType.__members__, id(peft), id(smn_peft), file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


def test_a_script_has_what_a_fresh_process_gives_it(tmp_path):
    for name, text in (("script.py", SCRIPT), ("beside.py", "WORD = 'own'")):
        (tmp_path / name).write_text(text)
    done = run_python(tmp_path / "script.py", "a b", 3, cwd=tmp_path.parent)
    assert (done.returncode, done.stdout) == (3, f"own ['a b', '3'] {tmp_path.parent}\n")
    registered, *modules = done.stderr.split()[-3:]
    assert registered == "True"
    assert modules != [str(id(peft)), str(id(smn_peft))]
    assert "beside" not in sys.modules


def test_an_error_is_told(tmp_path):
    done = run_python("-c", "import sys; print(len(sys.argv)); 1 / 0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "ZeroDivisionError: division by zero" in done.stderr
