# SPDX-License-Identifier: Apache-2.0
"""The kernels of Triton: in its interpreter on the CPU, compiled for a GPU, and run where there is one."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smn_peft.functional import effective, torch_kernels
from smn_peft.functional.effective import ConvGeometry, masked_conv, masked_linear
from smn_peft.functional.masking import MaskSpec, compute_mask, effective_weight, masked_weight
from smn_peft.functional.masking import straight_through as through
from smn_peft.functional.packing import pack_bits

from ..kernels import compiles, interpret, scalar_accesses

SPECS = (
    MaskSpec(),
    MaskSpec(threshold=0.3),
    MaskSpec(threshold=1e9),
    MaskSpec(scale=False),
    MaskSpec(scale_gradient=False),
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_passes(device: str) -> None:
    """Every pass against the written-out formulas; the effective weight and the count to the bit."""
    from smn_peft.functional import triton_kernels as kernels

    torch.manual_seed(0)
    for numel in (7, kernels._BLOCK.value, 5003, kernels._BLOCK.value * (2 * kernels._PARTS.value + 1) + 5):
        for spec in SPECS if numel == 5003 else SPECS[:1]:
            weight, scores, grad = torch.randn(3, numel).unbind()
            scores[::3] = spec.threshold  # a tie is off
            mask = compute_mask(scores, spec)
            places = [tensor.to(device, copy=True) for tensor in (weight, scores, grad)]
            weights, found = kernels.build(places[0], places[1], spec, None, torch.float32)
            assert torch.equal(weights.cpu(), effective_weight(weight, mask, spec.scale))
            assert int(found.active.sum()) == int(mask.sum())
            assert torch.equal(kernels.rebuild(places[0], places[1], spec, None, found, torch.float32)[0], weights)
            totals = kernels.inner(places[2], weights) if spec.scale and spec.scale_gradient else None
            gradient = kernels.score_gradient(places[2], places[0], None, found, totals, torch.float32)
            assert gradient is places[2]
            leaf = scores.double().requires_grad_()
            exact = replace(spec, threshold=float(torch.tensor(spec.threshold)))
            masked_weight(weight.double(), through(leaf, exact, torch.float64), exact).backward(grad.double())
            torch.testing.assert_close(gradient.cpu(), leaf.grad.float(), rtol=1e-5, atol=1e-5)


def check_dtypes(device: str) -> None:
    """Weights, scores, results and gradients in any narrow dtype: rounded once."""
    from smn_peft.functional import triton_kernels as kernels

    torch.manual_seed(0)
    for weight_dtype in FLOATS:
        for score_dtype in FLOATS:
            for dtype in FLOATS if weight_dtype == score_dtype else (weight_dtype,):
                weight, scores = torch.randn(300).to(weight_dtype), torch.randn(300).to(score_dtype)
                grad = torch.randn(300).to(dtype)
                spec = MaskSpec(threshold=0.1)
                mask = compute_mask(scores, spec)
                places = [tensor.to(device, copy=True) for tensor in (weight, scores, grad)]
                weights, found = kernels.build(places[0], places[1], spec, None, dtype)
                expected = effective_weight(weight.float(), mask).to(dtype)
                assert weights.dtype == dtype
                cut = device == "cpu" and dtype == torch.bfloat16  # Triton's interpreter does not round
                torch.testing.assert_close(weights.cpu(), expected, rtol=2**-7 if cut else 0.0, atol=0.0)
                totals = kernels.inner(places[2], weights)
                gradient = kernels.score_gradient(places[2], places[0], None, found, totals, score_dtype)
                assert gradient.dtype == score_dtype
                leaf = scores.double().requires_grad_()
                exact = masked_weight(weight.double(), through(leaf, spec, torch.float64), spec)
                exact.backward(grad.double())
                torch.testing.assert_close(gradient.cpu().double(), leaf.grad, rtol=2e-2, atol=2e-2)


def nodes(device: str) -> list[tuple[Tensor, float]]:
    """Gradients of nodes of several geometries, with many pixels and with few, and how exact they are."""
    results: list[tuple[Tensor, float]] = []
    for spec in SPECS:
        for channels_last in (0, 1, 3) if spec is SPECS[0] else (1,):  # a gradient may be laid out unlike its weight
            for size in (9, 2) if spec is SPECS[0] else (9,):
                torch.manual_seed(0)
                x, weight, scores = torch.randn(2, 8, size, size), torch.randn(16, 8, 3, 3), torch.randn(16, 8, 3, 3)
                bias = torch.randn(16)
                leaves = [tensor.to(device) for tensor in (x, weight, scores, bias)]
                for index in range(channels_last):
                    leaves[index] = leaves[index].contiguous(memory_format=torch.channels_last)
                for index in (0, 2, 3):
                    leaves[index].requires_grad_()
                geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
                masked_conv(*leaves, geometry, spec).square().sum().backward()
                results += [(leaf.grad.cpu(), 1e-5) for leaf in leaves if leaf.grad is not None]
        for dtype in (torch.float32, torch.bfloat16) if spec is SPECS[0] else (torch.float32,):
            torch.manual_seed(0)
            x, weight, scores = torch.randn(3, 5, 40, dtype=dtype), torch.randn(30, 40), torch.randn(30, 40)
            leaves = [tensor.to(device) for tensor in (x, weight, scores)]
            leaves[0].requires_grad_()
            leaves[2].requires_grad_()
            masked_linear(leaves[0], leaves[1], leaves[2], None, spec).float().square().sum().backward()
            exact = 1e-5 if dtype == torch.float32 else 2e-2
            results += [(leaves[0].grad.float().cpu(), exact), (leaves[2].grad.cpu(), exact)]
    return results


def check_same(found: list[tuple[Tensor, float]], expected: list[tuple[Tensor, float]]) -> None:
    for (mine, exact), (theirs, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=exact, atol=exact * float(theirs.abs().max()))


def check_nodes() -> None:
    """The nodes over the kernels, by the interpreter, against the nodes over torch's operations."""
    from smn_peft.functional import triton_kernels as kernels

    expected = nodes("cpu")
    used: list[Any] = []

    def chosen(weight: Tensor, *others: Any) -> Any:
        used.append(effective._fits(weight, *others))
        return kernels if used[-1] else torch_kernels

    effective.kernels_for = chosen
    check_same(nodes("cpu"), expected)
    assert all(used)


def check_write(device: str, write: Any) -> None:
    """The same bits as torch's operations, weights that are not finite included."""
    torch.manual_seed(0)
    for dtype in FLOATS:
        for numel in (7, 8, 5003):
            for scale in (1.0, 1.0371):
                weight, kept = torch.randn(numel).to(dtype), torch.rand(numel) < 0.7
                weight[::5] = -torch.inf
                expected, found = torch.empty_like(weight), torch.full_like(weight, 3.0, device=device)
                torch_kernels.write_masked(expected, weight, pack_bits(kept), scale)
                write(found, weight.to(device), pack_bits(kept).to(device), scale)
                integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
                if dtype == torch.float32 or scale == 1.0:
                    assert torch.equal(found.cpu().view(integer), expected.view(integer))
                else:
                    torch.testing.assert_close(found.cpu(), expected)


def test_where_they_apply():
    plain, last = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    point = torch.randn(4, 3, 1, 1)  # of one order in memory, whatever its strides say
    pairs = ((plain, plain), (last, last), (plain.bfloat16(), torch.nn.Parameter(plain)))
    for weight, scores in (*pairs, (point, point.contiguous(memory_format=torch.channels_last))):
        assert effective._fits(weight, scores, MaskSpec(threshold=0.5), None)
    assert not effective._fits(plain, plain, MaskSpec("topk", density=0.5), None)
    assert not effective._fits(plain, plain, MaskSpec(), plain > 0)
    other = plain[:, :2]  # with gaps, turned, on other strides, empty, wide
    for weight, scores in (
        (other, other),
        (plain.flatten(1).t(), plain.flatten(1).t()),
        (plain, last),
        (plain[:0], plain[:0]),
        (plain.double(), plain),
        (plain, plain.double()),
    ):
        assert not effective._fits(weight, scores, MaskSpec(), None)


def test_in_the_interpreter():
    # Few partial sums, so that a program takes several blocks
    few = "from smn_peft.functional import triton_kernels as kernels; kernels._PARTS = kernels.tl.constexpr(4)"
    checks = "check_passes('cpu'); check_dtypes('cpu'); check_write('cpu', kernels.write_masked); check_nodes()"
    interpret(f"{few}\nfrom tests.functional.test_triton_kernels import *\n{checks}")


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 80), ("bf16", 90)])
def test_they_compile(dtype, capability):
    kernels = pytest.importorskip("smn_peft.functional.triton_kernels")
    number, narrow = "i32", f"*{dtype}"
    count = {"parts": "*i32", "scores": narrow, "threshold": "fp32", "numel": number, "rounds": number}
    codes = [compiles(kernels._count, count, {}, capability)]
    dot = {"parts": "*fp32", "first": narrow, "second": narrow, "numel": number, "rounds": number}
    codes.append(compiles(kernels._dot, dot, {}, capability))
    build = {"out": narrow, "weight": "*fp32", "scores": "*fp32", "counts": "*i32", "threshold": "fp32"}
    for scale in (True, False):
        types = {**build, "numel": number, "length": number}
        codes.append(compiles(kernels._build, types, {"SCALE": scale}, capability))
    gradient = {"out": "*fp32", "grad": narrow, "weight": "*fp32", "counts": "*i32", "totals": "*fp32"}
    gradient |= dict.fromkeys(("numel", "length", "total_length"), number)
    for shift in (True, False):
        codes.append(compiles(kernels._gradient, gradient, {"SCALE": True, "SHIFT": shift}, capability))
    # A thread has 16 weights: partial sums are read one by one, weights, scores and gradients are not.
    assert all(scalar_accesses(code) <= 8 for code in codes)
    write = {"out": narrow, "weight": narrow, "packed": "*u8", "scale": "fp32", "numel": number}
    assert scalar_accesses(compiles(kernels._write, write, {}, capability)) == 2  # the bytes of bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    check_passes("cuda")
    check_dtypes("cuda")
    check_write("cuda", effective.write_masked)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check_same(nodes("cuda"), nodes("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_records_a_step():
    weight, x = torch.randn(64, 48, device="cuda"), torch.randn(8, 48, device="cuda")
    scores = torch.randn(64, 48, device="cuda", requires_grad=True)

    def step() -> None:
        masked_linear(x, weight, scores).square().sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled before anything is recorded
        step()
        scores.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    with torch.no_grad():
        scores.neg_()
    graph.replay()
    recorded, scores.grad = scores.grad.clone(), None
    step()
    torch.testing.assert_close(recorded, scores.grad)


# --- Where they cannot be used ---------------------------------------------------------------------------------------


def test_a_missing_triton_is_silent_and_kernels_that_fail_are_named(monkeypatch):
    name = "smn_peft.functional.triton_kernels"
    load = effective._triton_kernels.__wrapped__
    monkeypatch.delattr("smn_peft.functional.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is None

    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(build=fail))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(8))
    with pytest.warns(UserWarning, match="cannot compile the kernels of masks, .* slower: Failed to find C compiler"):
        assert load() is None
