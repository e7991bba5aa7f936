# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ as a user runs them, in this process, which has torch and PEFT imported already."""

from __future__ import annotations

import contextlib
import importlib
import io
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from smn_peft.objectives import base

from .processes import ROOT

__all__ = ["EXAMPLES", "import_example", "run_example"]

EXAMPLES = ROOT / "examples"


def import_example(name: str) -> ModuleType:
    """A module of examples/, imported by the name by which its neighbours import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def run_example(name: str, *arguments: object, folder: Path) -> str:
    """Output of a script that is run in a folder of its own; it must succeed and leave nothing there."""
    threads, output = torch.get_num_threads(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.syspath_prepend(str(EXAMPLES))
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(base, "OBJECTIVES", dict(base.OBJECTIVES))  # what it registers goes with it
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as error:
            if error.code:
                pytest.fail(f"{name} exited with {error.code}:\n{output.getvalue()}")
        finally:
            torch.set_num_threads(threads)
    assert list(folder.iterdir()) == [], "an example leaves nothing behind in the folder that it is run from"
    return output.getvalue()
