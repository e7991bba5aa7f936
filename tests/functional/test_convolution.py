# SPDX-License-Identifier: Apache-2.0
"""The gradient of a convolution's weight over few pixels: torch's values, in the weight's layout, where it pays."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from smn_peft.functional import convolution
from smn_peft.functional.convolution import ConvGeometry, convolution_backward

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def border(monkeypatch) -> None:
    """The same one on every processor."""
    monkeypatch.setattr(convolution, "_PIXELS_PER_CHANNEL", 4)


@pytest.fixture
def products(monkeypatch) -> list[Tensor]:
    """The products that were taken."""
    taken: list[Tensor] = []
    product = convolution._product

    def record(*args):
        taken.append(product(*args))
        return taken[-1]

    monkeypatch.setattr(convolution, "_product", record)
    return taken


def reference(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> list[Tensor]:
    """Gradients of input, weight and bias by autograd, in fp64."""
    leaves = [x.double(), weight.double(), torch.zeros(grad.shape[1], dtype=torch.float64)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(torch.convolution(*leaves, *geometry), leaves, grad.double()))


def problem(
    x: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype = torch.float32, **options
) -> tuple[Tensor, Tensor, Tensor, ConvGeometry]:
    dims = len(x) - 2
    geometry = ConvGeometry(
        options.get("stride", (1,) * dims),
        options.get("padding", (1,) * dims),
        options.get("dilation", (1,) * dims),
        options.get("transposed", False),
        (0,) * dims,
        options.get("groups", 1),
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(x, generator=generator, dtype=torch.float64).to(dtype)
    kernel = torch.randn(weight, generator=generator, dtype=torch.float64).to(dtype)
    output = torch.convolution(images, kernel, None, *geometry)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    return grad, images, kernel, geometry


def check(found: tuple[Tensor | None, ...], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


FEW = {
    "3x3 over 2x2": ((6, 16, 2, 2), (24, 16, 3, 3), {}),
    "strided": ((6, 16, 4, 4), (24, 16, 3, 3), {"stride": (2, 2)}),
    "one sample": ((1, 8, 3, 3), (24, 8, 3, 3), {}),
    "one pixel": ((4, 8, 1, 1), (24, 8, 3, 3), {}),
    "no padding": ((3, 8, 4, 5), (16, 8, 2, 3), {"padding": (0, 0)}),
    "uneven": ((3, 8, 5, 4), (16, 8, 3, 2), {"stride": (2, 1), "padding": (0, 1)}),
    "wide padding": ((2, 8, 2, 3), (64, 8, 5, 5), {"padding": (2, 3)}),
    "stride beyond the kernel": ((2, 8, 7, 7), (16, 8, 2, 2), {"stride": (3, 3)}),
}


@pytest.mark.parametrize("layouts", ["", "x", "grad", "weight", "x grad weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FEW)
def test_few_pixels(name, dtype, layouts, products):
    x, weight, options = FEW[name]
    *tensors, geometry = problem(x, weight, dtype, **options)
    tensors = [
        tensor.contiguous(memory_format=LAST) if label in layouts.split() else tensor
        for label, tensor in zip(("grad", "x", "weight"), tensors, strict=True)
    ]
    found = convolution_backward(*tensors, [weight[0]], geometry, [True, True, True])
    assert len(products) == 1
    check(found, reference(*tensors, geometry), 1e-5 if dtype == torch.float32 else 1e-12)
    assert found[1].stride() == tensors[2].stride()  # fused optimizers walk through both in one order


ELSEWHERE = {
    "many pixels": ((6, 16, 8, 8), (24, 16, 3, 3), {}),
    "one tap": ((6, 16, 2, 2), (24, 16, 1, 1), {"padding": (0, 0)}),
    "dilated": ((2, 16, 4, 4), (24, 16, 3, 3), {"dilation": (2, 2), "padding": (2, 2)}),
    "grouped": ((6, 16, 2, 2), (24, 8, 3, 3), {"groups": 2}),
    "transposed": ((6, 16, 2, 2), (16, 24, 3, 3), {"transposed": True}),
    "1d": ((6, 16, 4), (24, 16, 3), {}),
    "3d": ((2, 16, 2, 2, 2), (24, 16, 3, 3, 3), {}),
    "bf16": ((6, 16, 2, 2), (24, 16, 3, 3), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_everything_else_is_torch_s(name, products):
    x, weight, options = ELSEWHERE[name]
    *tensors, geometry = problem(x, weight, **options)
    bias = weight[1] * geometry.groups if geometry.transposed else weight[0]
    found = convolution_backward(*tensors, [bias], geometry, [True, True, True])
    assert not products
    check(found, reference(*tensors, geometry), 2e-2 if "dtype" in options else 1e-5)


@pytest.mark.parametrize("wanted", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a or b or c])
def test_only_what_is_wanted(wanted, products):
    grad, x, weight, geometry = problem((6, 16, 2, 2), (24, 16, 3, 3))
    found = convolution_backward(grad, x, weight, [24], geometry, [bool(want) for want in wanted])
    assert all(gradient is not None for gradient, want in zip(found, wanted, strict=True) if want)
    assert len(products) == wanted[1]


def test_a_border_of_four_pixels_per_channel(products):
    for side, expected in ((4, 1), (5, 0)):
        products.clear()
        grad, x, weight, geometry = problem((4, 16, side, side), (16, 16, 3, 3))
        convolution_backward(grad, x, weight, None, geometry, [False, True, False])
        assert len(products) == expected


def test_the_gradient_of_the_weight_does_not_read_the_weight():
    grad, x, weight, geometry = problem((6, 16, 2, 2), (24, 16, 3, 3))
    spoilt = torch.full_like(weight, torch.nan)
    found = convolution_backward(grad, x, spoilt, None, geometry, [False, True, False])[1]
    assert found.equal(convolution_backward(grad, x, weight, None, geometry, [False, True, False])[1])


def test_an_empty_batch_has_no_gradient():
    grad, x, weight, geometry = problem((0, 16, 2, 2), (24, 16, 3, 3))
    found = convolution_backward(grad, x, weight, None, geometry, [False, True, False])[1]
    assert found.shape == weight.shape
    assert not found.any()


@pytest.mark.parametrize("name", [*FEW, "many pixels", "one tap", "grouped", "transposed", "1d"])
def test_autograd_goes_through_twice(name):
    x, weight, options = (FEW | ELSEWHERE)[name]
    x, weight = (min(x[0], 2), 4, *x[2:]), (4, 4 // options.get("groups", 1), *weight[2:])
    _, images, kernel, geometry = problem(x, weight, torch.float64, **options)
    bias = torch.randn(4, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (images, kernel, bias)]

    def run(*tensors: Tensor) -> Tensor:
        return convolution.convolution(*tensors, geometry)

    assert run(*leaves).equal(torch.convolution(*leaves, *geometry))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_transforms_of_torch_func_go_through(products):
    _, x, weight, geometry = problem((6, 16, 2, 2), (24, 16, 3, 3), torch.float64)
    bias = torch.zeros(24, dtype=torch.float64)

    def loss(kernel: Tensor, image: Tensor, run) -> Tensor:
        return run(image[None], kernel, bias).square().sum()

    ours, plain = (
        torch.func.vmap(torch.func.grad(loss), (None, 0, None))(weight, x, run)
        for run in (lambda *t: convolution.convolution(*t, geometry), lambda *t: torch.convolution(*t, *geometry))
    )
    assert products
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_product_is_part_of_a_compiled_graph(dynamic):
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    grad, x, weight, geometry = problem((6, 16, 2, 2), (24, 16, 3, 3))
    leaf = weight.requires_grad_()
    compiled = torch.compile(
        convolution.convolution, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic
    )
    compiled(x, leaf, None, geometry).backward(grad)
    assert len(graphs) == 2
    assert "aten.mm" in graphs[1]
    assert "convolution_backward" not in graphs[1]
    check((leaf.grad,), reference(grad, x, weight, geometry)[1:2], 1e-5)
