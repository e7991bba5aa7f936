# SPDX-License-Identifier: Apache-2.0
"""Kernels of Triton without a GPU: run by its interpreter, and compiled to machine code that nothing runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from .processes import ROOT

__all__ = ["compiles", "interpret", "scalar_accesses"]


def interpret(code: str) -> None:
    """Run Python code with Triton's interpreter, which has to be asked for before Triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint('done')"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr


def compiles(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int = 80) -> str:
    """Compile a kernel for CUDA devices of a compute capability, as a first launch on whole weights would; its PTX."""
    pytest.importorskip("triton", minversion="3.3", reason="needs Triton's compiler of 3.3 or newer")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = (name.startswith("*") or key == "numel" for key, name in types.items())
    hints = {(index,): [["tt.divisibility", 16]] for index, hint in enumerate(aligned) if hint}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    assert compiled["cubin"]
    code: str = compiled["ptx"]
    return code


def scalar_accesses(code: str) -> int:
    """Loads and stores per thread of one number in the memory of a device, in PTX."""
    return len(re.findall(r"(?:ld|st)\.global(?!\S*\.v[24])", code))
