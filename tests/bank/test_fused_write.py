# SPDX-License-Identifier: Apache-2.0
"""The kernel of the dense write, in Triton's interpreter on the CPU, and compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from smn_peft.bank.live_tensor import write_masked
from smn_peft.functional.packing import pack_bits

from ..kernels import compiles, interpret, scalar_accesses

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(device: str, write) -> None:
    """The same bits as the CPU's own write, weights that are not finite included."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for numel in (1, 7, 8, 4096, 5003):
            for scale in (1.0, 1.0371):
                weight, kept = torch.randn(numel).to(dtype), torch.rand(numel) < 0.7
                weight[::5] = -torch.inf
                expected, found = torch.empty_like(weight), torch.full_like(weight, 3.0, device=device)
                write_masked(expected, weight, pack_bits(kept), scale)
                write(found, weight.to(device), pack_bits(kept).to(device), scale)
                integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
                if dtype == torch.float32 or scale == 1.0:
                    assert torch.equal(found.cpu().view(integer), expected.view(integer))
                else:
                    torch.testing.assert_close(found.cpu(), expected)


def test_the_kernel_in_the_interpreter():
    code = "from smn_peft.bank.fused_write import fused_write; from tests.bank.test_fused_write import check; "
    interpret(code + "check('cpu', fused_write)")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_it_compiles(dtype):
    module = pytest.importorskip("smn_peft.bank.fused_write")
    types = {"out": f"*{dtype}", "weight": f"*{dtype}", "packed": "*u8", "scale": "fp32", "numel": "i32"}
    code = compiles(module._write, types, {"BLOCK": module._BLOCK})
    assert scalar_accesses(code) == 2  # the bytes of bits, eight weights each


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_compiled():
    check("cuda", write_masked)
