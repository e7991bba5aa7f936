# SPDX-License-Identifier: Apache-2.0
"""The autograd nodes against plain autograd over the written-out effective weight; weights written from bits."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smn_peft.functional import torch_kernels
from smn_peft.functional.effective import ConvGeometry, masked_conv, masked_linear, write_masked
from smn_peft.functional.masking import MaskSpec, compute_mask, effective_weight, masked_weight
from smn_peft.functional.masking import straight_through as through
from smn_peft.functional.packing import pack_bits

SPECS = {
    "threshold": MaskSpec(),
    "above": MaskSpec(threshold=0.3),
    "no-scale-gradient": MaskSpec(scale_gradient=False),
    "unscaled": MaskSpec(scale=False),
    "topk": MaskSpec("topk", density=0.4),
    "topk-absolute": MaskSpec("topk", density=0.4, absolute=True),
}


@dataclass(frozen=True)
class Conv:
    dims: int
    weight: tuple[int, ...]
    x: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    transposed: bool = False
    output_padding: int = 0
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        each = [(value,) * self.dims for value in (self.stride, self.padding, self.dilation, self.output_padding)]
        return ConvGeometry(each[0], each[1], each[2], self.transposed, each[3], self.groups)

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The public function of torch.nn.functional."""
        if not self.transposed:
            function = getattr(F, f"conv{self.dims}d")
            return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        function = getattr(F, f"conv_transpose{self.dims}d")
        return function(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


CONVS = {
    "1d": Conv(1, (4, 3, 3), (2, 3, 9)),
    "1d-strided-dilated": Conv(1, (4, 3, 3), (2, 3, 15), stride=2, padding=2, dilation=2),
    "2d": Conv(2, (4, 3, 3, 2), (2, 3, 6, 5)),
    "2d-padded-strided": Conv(2, (4, 3, 3, 3), (2, 3, 7, 6), stride=2, padding=1),
    "2d-pointwise": Conv(2, (6, 4, 1, 1), (2, 4, 5, 5)),
    "2d-grouped": Conv(2, (6, 2, 3, 3), (2, 4, 6, 6), groups=2, padding=1),
    "2d-depthwise": Conv(2, (8, 1, 3, 3), (2, 4, 6, 6), groups=4),
    "2d-dilated": Conv(2, (4, 3, 3, 3), (2, 3, 9, 9), dilation=3, padding=2),
    "3d": Conv(3, (3, 2, 2, 2, 2), (2, 2, 4, 5, 3), padding=1),
    "3d-grouped-strided": Conv(3, (4, 2, 2, 2, 2), (2, 4, 5, 5, 4), groups=2, stride=2),
    "transposed-1d": Conv(1, (3, 4, 3), (2, 3, 5), transposed=True, stride=2, output_padding=1),
    "transposed-2d": Conv(2, (4, 3, 3, 3), (2, 4, 4, 5), transposed=True, groups=2, padding=1),
    "transposed-2d-dilated": Conv(2, (3, 2, 2, 2), (2, 3, 4, 4), transposed=True, dilation=2, stride=2),
    "transposed-3d": Conv(3, (2, 3, 2, 2, 2), (2, 2, 3, 3, 3), transposed=True, stride=2),
}

Operation = Callable[[Tensor, Tensor, Tensor, Tensor | None, MaskSpec, Tensor | None], Tensor]
Plain = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def problem(
    name: str, dtype: torch.dtype, bias: bool = True, channels_last: bool = False
) -> tuple[Operation, Plain, list[Tensor], Tensor | None]:
    """The node, the plain function, [input, weight, scores] and a bias, for a convolution or "linear"."""
    generator = torch.Generator().manual_seed(0)
    conv = CONVS.get(name)
    shapes = (conv.x, conv.weight) if conv else ((2, 5, 7), (4, 7))
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    scores = torch.randn(shapes[1], generator=generator, dtype=torch.float64)
    out = conv.out_channels if conv else 4
    offset = torch.randn(out, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    tensors = [x.to(dtype), weight.to(dtype), scores if dtype == torch.float64 else scores.float()]
    if channels_last:
        tensors = [tensor.to(memory_format=torch.channels_last) for tensor in tensors]
    if conv is None:
        return masked_linear, F.linear, tensors, offset

    def operation(x, weight, scores, bias, spec, trainable):
        return masked_conv(x, weight, scores, bias, conv.geometry, spec, trainable)

    return operation, conv.plain, tensors, offset


def gradients(run: Callable[..., Tensor], x: Tensor, scores: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output and gradients of input, scores and bias under a fixed upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, scores, bias) if tensor is not None]
    out = run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


NAMES = ["linear", *CONVS]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_plain_autograd(name):
    operation, plain, (x, weight, scores), bias = problem(name, torch.float64)
    some = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    for trainable in (None, some):
        for spec in SPECS.values():
            actual = gradients(lambda x, s, b, o=spec, t=trainable: operation(x, weight, s, b, o, t), x, scores, bias)
            expected = gradients(
                lambda x, s, b, o=spec, t=trainable: plain(
                    x, masked_weight(weight, through(s, o, weight.dtype, t), o), b
                ),
                x,
                scores,
                bias,
            )
            for mine, theirs in zip(actual, expected, strict=True):
                assert mine.dtype == theirs.dtype
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_the_effective_weight_s(name):
    """Bit for bit: what trains is what is saved and evaluated."""
    for dtype in (torch.float64, torch.float32):
        operation, plain, (x, weight, scores), bias = problem(name, dtype)
        for spec in SPECS.values():
            expected = plain(x, effective_weight(weight, compute_mask(scores, spec), spec.scale), bias)
            actual = operation(x, weight, scores.requires_grad_(), bias, spec, None)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", [MaskSpec(), MaskSpec(threshold=1e9), SPECS["unscaled"], SPECS["no-scale-gradient"]])
def test_few_pixels_and_many_channels(bias, spec):
    """The scale goes on the input's gradient then, and σ's term comes from it."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 2, 2, dtype=torch.float64)
    weight, scores = torch.randn(2, 32, 16, 3, 3, dtype=torch.float64)
    offset = torch.randn(32, dtype=torch.float64) if bias else None
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)

    def run(function):
        inputs = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        out = function(*inputs)
        out.square().sum().backward()
        return [out.detach(), *(tensor.grad for tensor in inputs)]

    mine = run(lambda a, s: masked_conv(a, weight, s, offset, geometry, spec))
    plain = run(
        lambda a, s: torch.nn.functional.conv2d(
            a, masked_weight(weight, through(s, spec, weight.dtype), spec), offset, padding=1
        )
    )
    for actual, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_mask_is_the_base_bit_for_bit(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        operation, plain, (x, weight, scores), bias = problem(name, dtype)
        full = torch.ones_like(scores, requires_grad=True)
        assert torch.equal(operation(x, weight, full, bias, MaskSpec(), None), plain(x, weight, bias))


@pytest.mark.parametrize("name", ["linear", "1d", "2d-grouped", "3d", "transposed-2d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", ["scores", "input", "both"])
def test_only_what_is_asked_for_gets_a_gradient(name, bias, wanted):
    operation, plain, (x, weight, scores), offset = problem(name, torch.float64, bias)
    x.requires_grad_(wanted != "scores")
    scores.requires_grad_(wanted != "input")
    weight.requires_grad_()
    operation(x, weight, scores, offset, MaskSpec(), None).square().sum().backward()
    assert weight.grad is None
    twins = [tensor.detach().clone().requires_grad_() for tensor in (x, scores)]
    mask = through(twins[1], MaskSpec(), torch.float64)
    plain(twins[0], masked_weight(weight.detach(), mask, MaskSpec()), offset).square().sum().backward()
    for tensor, twin in zip((x, scores), twins, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "2d", "transposed-1d"])
@pytest.mark.parametrize("spec", [MaskSpec(threshold=1e9), MaskSpec(threshold=1e9, scale_gradient=False)])
def test_an_empty_mask_gives_zeros_and_finite_gradients(name, spec):
    operation, plain, (x, weight, scores), bias = problem(name, torch.float64)
    actual = gradients(lambda x, s, b: operation(x, weight, s, b, spec, None), x, scores, bias)
    torch.testing.assert_close(actual[0], plain(x, torch.zeros_like(weight), bias))
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    assert not actual[1].any()
    assert actual[2].any()


@pytest.mark.parametrize("name", ["linear", "2d", "2d-grouped", "transposed-2d"])
@pytest.mark.parametrize(("weight_dtype", "x_dtype"), [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_narrow_types_give_wide_score_gradients(name, weight_dtype, x_dtype):
    operation, plain, (x, weight, scores), bias = problem(name, torch.float64)
    weight, x, bias, scores = weight.to(weight_dtype), x.to(x_dtype), bias.to(x_dtype), scores.float()
    actual = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
    assert actual[0].dtype == x_dtype
    assert actual[2].dtype == torch.float32
    wide = [tensor.double() for tensor in (x, scores, bias)]
    expected = gradients(
        lambda x, s, b: plain(x, masked_weight(weight.double(), through(s, MaskSpec(), torch.float64), MaskSpec()), b),
        *wide,
    )
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=4e-2, atol=4e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["2d", "2d-grouped", "transposed-2d"])
def test_channels_last_gives_the_same(name):
    operation, _, tensors, bias = problem(name, torch.float64)
    plain = gradients(lambda x, s, b: operation(x, tensors[1], s, b, MaskSpec(), None), tensors[0], tensors[2], bias)
    _, _, (x, weight, scores), _ = problem(name, torch.float64, channels_last=True)
    assert not weight.is_contiguous()
    last = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
    for mine, theirs in zip(last, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_not_contiguous():
    operation, _, (x, weight, scores), bias = problem("linear", torch.float64)
    turned = weight.t().contiguous().t()
    assert not turned.is_contiguous()
    mine = gradients(lambda x, s, b: operation(x, turned, s, b, MaskSpec(), None), x, scores, bias)
    theirs = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
    for first, second in zip(mine, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_a_score_at_the_threshold_is_off_forward_and_backward():
    for threshold in (0.0, 0.1, 1 / 3):
        edge = float(torch.tensor(threshold, dtype=torch.float32))
        scores = torch.tensor([[edge, edge + 1e-6, edge - 1e-6, 5.0]], requires_grad=True)
        weight, x = torch.ones(1, 4), torch.eye(4, requires_grad=True)
        spec = MaskSpec(threshold=threshold, scale=False)
        out = masked_linear(x, weight, scores, None, spec)
        expected = compute_mask(scores.detach(), spec).float()
        assert expected.flatten().tolist() == [0, 1, 0, 1]
        assert torch.equal(out.detach().flatten(), expected.flatten())
        out.sum().backward()
        assert torch.equal(x.grad[0], expected[0])


@pytest.mark.parametrize("name", ["linear", "2d", "transposed-2d"])
def test_a_step_between_forward_and_backward_is_noticed(name):
    operation, _, (x, weight, scores), bias = problem(name, torch.float64)
    scores.requires_grad_()
    out = operation(x, weight, scores, bias, MaskSpec(), None)
    with torch.no_grad():
        scores.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["linear", "2d"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant):
    operation, _, (x, weight, scores), bias = problem(name, torch.float64)
    plain = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
    saving = gradients(
        lambda x, s, b: checkpoint(operation, x, weight, s, b, MaskSpec(), None, use_reentrant=use_reentrant),
        x,
        scores,
        bias,
    )
    for first, second in zip(plain, saving, strict=True):
        assert torch.equal(first, second)


def test_a_second_derivative_is_refused_and_not_wrong():
    operation, _, (x, weight, scores), bias = problem("linear", torch.float64)
    scores.requires_grad_()
    (grad,) = torch.autograd.grad(
        operation(x, weight, scores, bias, MaskSpec(), None).square().sum(), scores, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_the_effective_weight_is_not_kept_alive(name, monkeypatch):
    """The node's promise: between forward and backward only what was there before is in memory."""
    operation, _, (x, weight, scores), bias = problem(name, torch.float64)
    scores.requires_grad_()
    out = operation(x, weight, scores, bias, MaskSpec(), None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = operation(x, weight, scores, bias, MaskSpec(), None)
    assert {tensor.data_ptr() for tensor in kept} <= {x.data_ptr(), weight.data_ptr(), scores.data_ptr()}
    node = weakref.ref(out.grad_fn)
    del out
    assert node() is None


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_inputs_without_a_batch_dimension_or_of_size_zero(name):
    operation, plain, (x, weight, scores), bias = problem(name, torch.float64)
    empty = x[:0].clone()
    actual = gradients(lambda x, s, b: operation(x, weight, s, b, replace(MaskSpec()), None), empty, scores, bias)
    assert actual[0].shape == plain(empty, weight, bias).shape
    assert not actual[2].any()
    if name == "linear":
        vector = x[0, 0]
        mine = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), vector, scores, bias)
        row = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), vector[None], scores, bias)
        for first, second in zip(mine, row, strict=True):
            torch.testing.assert_close(first.flatten(), second.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_a_default_device_elsewhere_does_not_matter(name):
    operation, _, (x, weight, scores), bias = problem(name, torch.float64)
    expected = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scores, bias)]
    with torch.device("meta"):
        out = operation(leaves[0], weight, leaves[1], leaves[2], MaskSpec(), None)
        out.backward(torch.ones_like(out))
    assert torch.equal(out, expected[0])
    assert all(leaf.grad.device.type == "cpu" for leaf in leaves)


def test_threads_do_not_disturb_each_other():
    def work(seed: int) -> bool:
        operation, _, (x, weight, scores), bias = problem("linear", torch.float64)
        weight = weight * (seed + 1)
        first = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
        for _ in range(50):
            again = gradients(lambda x, s, b: operation(x, weight, s, b, MaskSpec(), None), x, scores, bias)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_graph_can_be_walked_twice():
    operation, _, (x, weight, scores), bias = problem("2d", torch.float64)
    scores.requires_grad_()
    x.requires_grad_()
    out = operation(x, weight, scores, bias, MaskSpec(), None).square().sum()
    first = torch.autograd.grad(out, (x, scores), retain_graph=True)
    operation(x * 2, weight * 3, scores, bias, MaskSpec(), None).square().sum().backward()  # uses the same memory
    second = torch.autograd.grad(out, (x, scores))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["linear", "2d", "transposed-2d"])
def test_the_operations_of_other_devices(name, monkeypatch):
    """What is found of the mask is a tensor there, which nothing may read."""
    operation, _, (x, weight, scores), bias = problem(name, torch.float64)
    some = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    few = x[:1, ..., :2].contiguous() if name != "linear" else x

    def run() -> list[Tensor]:
        cases = [(x, spec, chosen) for x in (x, few) for spec in SPECS.values() for chosen in (None, some)]
        return [
            gradient
            for x, spec, chosen in cases
            for gradient in gradients(lambda x, s, b: operation(x, weight, s, b, spec, chosen), x, scores, bias)  # noqa: B023
        ]

    expected = run()

    monkeypatch.setattr(torch_kernels, "_in_memory", lambda *_: False)
    for mine, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_every_weight_counts():
    for numel, dtype in ((1001, torch.bfloat16), (1000, torch.float64), (2**24 + 3, torch.float32)):
        weight = torch.ones(numel, dtype=dtype)
        effective, found = torch_kernels.build(weight, torch.ones(numel), MaskSpec(), None, dtype)
        assert found == (numel, 1.0)
        assert torch.equal(effective, weight)


# --- Written from bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_dense_write_is_the_product(compiled, monkeypatch):
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(torch_kernels, "compiled", lambda _: None)
        monkeypatch.setattr(torch_kernels, "_CHUNK", 1000)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for numel in (1, 13, 64, 70_001):
            weight, mask = torch.randn(numel).to(dtype), torch.rand(numel) > 0.3
            weight[0], mask[0] = float("inf"), numel % 2  # a product would make NaN of it
            out = torch.full_like(weight, float("nan"))
            write_masked(out, weight, pack_bits(mask))
            assert torch.equal(out, torch.where(mask, weight, 0))
            write_masked(out, weight, pack_bits(mask), 1.25)
            assert torch.equal(out, torch.where(mask, weight, 0) * 1.25)


def test_a_folder_called_numba_is_no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", types.ModuleType("numba"))
    assert torch_kernels.compiled.__wrapped__(torch_kernels._write) is None
