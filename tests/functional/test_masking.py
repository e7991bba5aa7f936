# SPDX-License-Identifier: Apache-2.0
"""Masks, effective weights and their gradient, against loops in numpy; the paper's two theorems, bit by bit."""

from __future__ import annotations

import functools
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from smn_peft.functional.effective import masked_linear
from smn_peft.functional.masking import (
    MASK_TYPES,
    MaskSpec,
    compute_mask,
    density,
    effective_weight,
    masked_weight,
    progressive_density,
    scale_of,
    straight_through,
    threshold_mask,
    topk_mask,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_a_tie_is_off():
    scores = torch.tensor([-1.0, 0.0, -0.0, 1e-45, 1.0])
    assert threshold_mask(scores).tolist() == [False, False, False, True, True]
    assert threshold_mask(torch.tensor([0.5, 0.5 + 1e-7]), 0.5).tolist() == [False, True]


def test_threshold_mask_is_the_comparison():
    for dtype, shape in product(FLOATS, [(), (0,), (1,), (7,), (4, 3, 2)]):
        scores = torch.randn(shape).to(dtype)
        expected = np.array([float(s) > 0.25 for s in scores.flatten()], dtype=bool).reshape(shape)
        assert np.array_equal(threshold_mask(scores, 0.25).numpy(), expected)


def test_topk_keeps_the_highest_and_exactly_so_many():
    cases = product([1, 2, 7, 64, 1001], [False, True], enumerate((0.0, 0.1, 0.5, 0.77, 1.0)))
    for numel, absolute, (seed, kept) in cases:
        scores = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
        mask = topk_mask(scores, kept, absolute)
        count = round(kept * numel)
        ranked = (scores.abs() if absolute else scores).numpy()
        expected = np.zeros(numel, dtype=bool)
        expected[np.argsort(-ranked, kind="stable")[:count]] = True
        assert int(mask.sum()) == count
        assert np.array_equal(mask.numpy(), expected)


def test_topk_breaks_ties_by_position():
    scores = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert topk_mask(scores, 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert topk_mask(torch.ones(2, 5), 0.3).flatten().tolist() == [True] * 3 + [False] * 7
    coarse = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(0)).float()
    expected = np.zeros(500, dtype=bool)
    expected[np.argsort(-coarse.numpy(), kind="stable")[:200]] = True
    assert np.array_equal(topk_mask(coarse, 0.4).numpy(), expected)


def test_topk_of_nothing_and_of_a_bad_density():
    assert topk_mask(torch.empty(0, 3), 0.5).shape == (0, 3)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got"):
            topk_mask(torch.ones(3), bad)


def test_topk_leaves_the_scores_alone():
    scores = torch.randn(20, requires_grad=True)
    before = scores.detach().clone()
    mask = topk_mask(scores, 0.5)
    assert torch.equal(scores, before)
    assert not mask.requires_grad


def test_progressive_density_goes_linearly_and_stays():
    assert [progressive_density(p, 0.2) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    assert progressive_density(0.25, 0.4, start=0.8) == pytest.approx(0.7)


@pytest.mark.parametrize("mask_type", ["threshold", "topk"])
def test_what_is_not_trainable_is_on_and_not_ranked(mask_type):
    scores = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    spec = MaskSpec(mask_type, density=0.25)
    for trainable in (scores < 0.3, scores > -0.3):  # the ones that take part have low scores, or high ones
        mask = compute_mask(scores, spec, trainable)
        assert mask[~trainable].all()
        assert torch.equal(mask[trainable], MASK_TYPES[mask_type](scores[trainable], spec))
        if mask_type == "topk":
            assert int(mask[trainable].sum()) == round(0.25 * int(trainable.sum()))
    assert torch.equal(compute_mask(scores, spec), MASK_TYPES[mask_type](scores, spec))


def test_density_counts():
    assert density(torch.tensor([True, False, False, True])) == 0.5
    assert density(torch.zeros(0, dtype=torch.bool)) == 0.0


# --- Effective weights -----------------------------------------------------------------------------------------------


def test_a_full_mask_gives_the_weight_bit_for_bit():
    for dtype, numel in product(FLOATS, [*range(1, 70), 999, 4099]):
        weight = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
        full = torch.ones(numel, dtype=torch.bool)
        assert torch.equal(effective_weight(weight, full), weight)
        assert float(scale_of(full.sum(), numel)) == 1.0
        assert torch.equal(masked_weight(weight, full.to(dtype), MaskSpec()), weight)


def test_a_full_mask_of_millions():
    weight = torch.randn(2**24 + 3)  # fp32 cannot count one by one beyond 2**24
    full = torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(effective_weight(weight, full), weight)
    assert torch.equal(masked_weight(weight, full.float(), MaskSpec()), weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_empty_mask_gives_zeros_and_finite_gradients(dtype):
    weight = torch.randn(5, 4).to(dtype)
    assert not effective_weight(weight, torch.zeros(5, 4, dtype=torch.bool)).any()
    for scale_gradient in (True, False):
        scores = torch.full((5, 4), -1.0, requires_grad=True)
        spec = MaskSpec(scale_gradient=scale_gradient)
        out = masked_weight(weight, straight_through(scores, spec, dtype), spec)
        assert not out.any()
        (out * torch.randn(5, 4).to(dtype)).sum().backward()
        assert torch.isfinite(scores.grad).all()
        assert scores.grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [True, False])
def test_effective_weight_is_theta_m_over_sigma(dtype, scale):
    tolerance = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 7, generator=generator).to(dtype)
        mask = torch.rand(6, 7, generator=generator) < (seed + 1) / 21
        if not mask.any():
            continue
        sigma = math.sqrt(int(mask.sum()) / 42) if scale else 1.0
        expected = weight.double().numpy() * mask.numpy() / sigma
        for actual in (
            effective_weight(weight, mask, scale),
            masked_weight(weight, mask.to(dtype), MaskSpec(scale=scale)),
        ):
            assert actual.dtype == dtype
            np.testing.assert_allclose(actual.double().numpy(), expected, rtol=tolerance)
            assert not actual[~mask].any()


def test_what_the_mask_removes_is_zero_even_where_the_weight_is_not_a_number():
    weight = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    assert effective_weight(weight, torch.tensor([False, False, False, True])).tolist() == [0, 0, 0, 4]


def test_the_weight_is_not_written_to():
    weight = torch.randn(6, 7)
    before = weight.clone()
    effective_weight(weight, torch.ones(6, 7, dtype=torch.bool)).zero_()
    effective_weight(weight, torch.ones(6, 7, dtype=torch.bool), scale=False).zero_()
    assert torch.equal(weight, before)


def test_effective_weight_has_no_graph():
    weight = torch.randn(6, 7, requires_grad=True)
    assert not effective_weight(weight, torch.ones(6, 7, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("active", [torch.tensor(3), torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)])
def test_scale_is_the_square_root_of_n_over_active(active):
    scale = scale_of(active, 12)
    assert scale.shape == ()
    assert scale.dtype == (torch.float64 if active.dtype == torch.float64 else torch.float32)
    assert scale_of(torch.tensor(3), 12, torch.float64).dtype == torch.float64
    assert float(scale) == 2.0
    assert float(scale_of(torch.zeros_like(active), 12)) == pytest.approx(math.sqrt(12))


# --- The gradient ----------------------------------------------------------------------------------------------------


def closed_formula(weight: Tensor, mask: Tensor, grad: Tensor, scale_gradient: bool = True) -> np.ndarray:
    """dL/dS_i = s·θ_i·g_i − (s²/2N)·Σ_j g_j·θ̂_j with s = 1/σ, entry by entry."""
    theta, bits, g = (list(map(float, tensor.flatten())) for tensor in (weight, mask, grad))
    total, active = len(theta), sum(bits)
    s = math.sqrt(total / active)
    inner = sum(g[j] * theta[j] * bits[j] * s for j in range(total))
    return np.array(
        [s * theta[i] * g[i] - (s * s / (2 * total) * inner if scale_gradient else 0.0) for i in range(total)]
    ).reshape(weight.shape)


@pytest.mark.parametrize("scale_gradient", [True, False])
def test_the_gradient_is_the_closed_formula(scale_gradient):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight, grad, scores = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
        scores.requires_grad_()
        spec = MaskSpec(scale_gradient=scale_gradient)
        masked_weight(weight, straight_through(scores, spec, torch.float64), spec).backward(grad)
        expected = closed_formula(weight, scores.detach() > 0, grad, scale_gradient)
        np.testing.assert_allclose(scores.grad.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_dropping_the_scale_s_gradient_drops_exactly_the_second_term():
    generator = torch.Generator().manual_seed(0)
    weight, grad, start = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    gradients = []
    for scale_gradient in (True, False):
        scores = start.clone().requires_grad_()
        spec = MaskSpec(scale_gradient=scale_gradient)
        masked_weight(weight, straight_through(scores, spec, torch.float64), spec).backward(grad)
        gradients.append(scores.grad)
    mask = start > 0
    difference = gradients[1] - gradients[0]
    s = math.sqrt(25 / int(mask.sum()))
    expected = s**2 / 50 * float((grad * effective_weight(weight, mask)).sum())
    torch.testing.assert_close(difference, torch.full_like(difference, expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[1], s * weight * grad, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_the_slope_of_the_relaxed_mask():
    generator = torch.Generator().manual_seed(3)
    weight, target = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    start = (torch.rand(4, 5, generator=generator) < 0.6).double()

    def loss(mask: Tensor) -> Tensor:
        kept = weight * mask
        return ((kept / (mask.sum() / mask.numel()).sqrt() - target) ** 3).sum()

    step, slopes = 1e-6, torch.zeros_like(start)
    for index in np.ndindex(4, 5):
        up, down = start.clone(), start.clone()
        up[index] += step
        down[index] -= step
        slopes[index] = (loss(up) - loss(down)) / (2 * step)
    scores = (start * 2 - 1).requires_grad_()
    mask = straight_through(scores, MaskSpec(), torch.float64)
    ((masked_weight(weight, mask, MaskSpec()) - target) ** 3).sum().backward()
    torch.testing.assert_close(scores.grad, slopes, rtol=1e-6, atol=1e-6)


def test_gradcheck_of_the_masked_weight():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=False) + 1  # stays above the clamp
    mask.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: masked_weight(weight, m, MaskSpec()), (mask,))
    assert torch.autograd.gradcheck(lambda m: masked_weight(weight, m, MaskSpec(scale=False)), (mask,))


@pytest.mark.parametrize("mask_type", sorted(MASK_TYPES))
def test_straight_through_passes_the_gradient_on_unclipped(mask_type):
    scores = (torch.randn(6, 4) * 100).requires_grad_()
    grad = torch.randn(6, 4) * 1e6
    spec = MaskSpec(mask_type, density=0.5)
    mask = straight_through(scores, spec, torch.float32)
    assert torch.equal(mask.bool(), compute_mask(scores, spec))
    mask.backward(grad)
    assert torch.equal(scores.grad, grad)


def test_straight_through_gives_no_gradient_to_what_is_not_trainable():
    scores = torch.randn(8, requires_grad=True)
    trainable = torch.tensor([True, False] * 4)
    mask = straight_through(scores, MaskSpec(), torch.bfloat16, trainable)
    assert mask.dtype == torch.bfloat16
    assert bool(mask[~trainable].all())
    mask.sum().backward()
    assert scores.grad.dtype == torch.float32
    assert torch.equal(scores.grad, trainable.float())


# --- The theorems ----------------------------------------------------------------------------------------------------

STEPS = 120


@functools.cache
def masks_of_training(
    lr: float, start: float, threshold: float, dtype: torch.dtype, decay: float = 0.0, fused: bool = False
) -> list[Tensor]:
    """Masks after every step of a small problem, with momentum SGD."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator).to(dtype) / 4 for shape in ((24, 16), (8, 24)))
    x = torch.randn(32, 16, generator=generator).to(dtype)
    target = torch.randn(32, 8, generator=generator).to(dtype)
    spec = MaskSpec(threshold=threshold)
    scores = [torch.full(weight.shape, start, dtype=dtype, requires_grad=True) for weight in (first, second)]
    optimizer = torch.optim.SGD(scores, lr=lr, momentum=0.9, weight_decay=decay)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        hidden = x
        for index, (weight, score) in enumerate(zip((first, second), scores, strict=True)):
            if fused:
                hidden = masked_linear(hidden, weight, score, None, spec)
            else:
                hidden = hidden @ masked_weight(weight, straight_through(score, spec, dtype), spec).t()
            hidden = hidden.relu() if index == 0 else hidden
        (hidden - target).square().sum(1).mean().backward()
        optimizer.step()
        history.append(torch.cat([compute_mask(score.detach(), spec).flatten() for score in scores]))
    return history


def differing(first: list[Tensor], second: list[Tensor]) -> int:
    """Bits that differ, over all steps."""
    return sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))


LR = 2.0


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def base(request) -> tuple[torch.dtype, list[Tensor]]:
    history = masks_of_training(LR, 1.0, 0.0, request.param)
    flips = sum(int((a != b).sum()) for a, b in pairwise(history))
    assert flips > 100  # there is something to compare
    assert 0.2 < density(history[-1]) < 0.95
    return request.param, history


SETTINGS = [(1, 1.5, 0.5), (1, 0.0, -1.0), (2, 2.0, 0.0), (4, 4.0, 0.0), (0.5, 0.5, 0.0), (3, 3.0, 0.0), (2, 2.5, 0.5)]


@pytest.mark.parametrize(
    ("fused", "factor", "start", "threshold"),
    [*((False, *setting) for setting in SETTINGS), *((True, *setting) for setting in SETTINGS[:1])],
)
def test_theorems_1_and_2_equivalent_settings_give_the_same_masks(base, factor, start, threshold, fused):
    dtype, expected = base
    if fused:
        expected = masks_of_training(LR, 1.0, 0.0, dtype, fused=True)
    history = masks_of_training(LR * factor, start, threshold, dtype, fused=fused)
    assert len(history) == STEPS
    assert differing(history, expected) == 0


def test_theorem_2_divides_the_weight_decay(base):
    dtype, _ = base
    expected = masks_of_training(LR, 1.0, 0.0, dtype, decay=0.01)
    assert differing(masks_of_training(LR * 3, 3.0, 0.0, dtype, decay=0.01 / 3), expected) == 0
    assert differing(masks_of_training(LR * 3, 3.0, 0.0, dtype, decay=0.01), expected) > 0


@pytest.mark.parametrize(("factor", "start"), [(2, 1.0), (1, 2.0)], ids=["only the rate", "only the start"])
def test_controls_change_the_masks(base, factor, start):
    dtype, expected = base
    changed = differing(masks_of_training(LR * factor, start, 0.0, dtype), expected)
    assert changed > 0.02 * STEPS * expected[0].numel()
