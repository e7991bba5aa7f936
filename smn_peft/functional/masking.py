# SPDX-License-Identifier: Apache-2.0
"""Binary masks over frozen weights: which weights take part, from scores to mask, from mask to effective weight.

Notation of the paper (section 3): frozen weight θ, score S, threshold μ, mask ``M = 1[S > μ]``, and the effective
weight ``θ̂ = θ · M / σ`` with ``σ = sqrt(active / N)``, one σ per tensor. This library calls the fraction of weights
that stay active *density*; the paper calls it "sparsity".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_IN_CACHE = 2**17  # scores of a part that a core's cache holds


@dataclass(frozen=True)
class MaskSpec:
    """How scores become a mask, and a mask an effective weight.

    Attributes:
        mask_type: A key of [`MASK_TYPES`].
        threshold: μ of ``1[S > μ]`` (mask type ``threshold``).
        density: Fraction of the trainable weights that stay active (mask type ``topk``).
        absolute: Rank by ``|S|`` and not by ``S`` (mask type ``topk``).
        scale: Divide the masked weight by σ.
        scale_gradient: Let the gradient flow through σ, as Eq. 1 differentiated says.
    """

    mask_type: str = "threshold"
    threshold: float = 0.0
    density: float = 1.0
    absolute: bool = False
    scale: bool = True
    scale_gradient: bool = True


def threshold_mask(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Return the mask of the scores above a threshold, ``1[S > μ]`` (section 3.1), as bool; a tie is off."""
    return scores > threshold


def topk_mask(scores: Tensor, density: float, absolute: bool = False) -> Tensor:
    """Return the mask of the highest scores of one tensor (Ramanujan et al. 2020; the paper's topk baseline).

    Exactly ``round(density · N)`` entries are on; among equal scores at the border, the first in C order win, so that
    the answer does not depend on the device. Ranked by ``S`` (the authors' code) or, if `absolute`, by ``|S|``
    (Ramanujan et al.). ValueError if `density` is not in [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must lie in [0, 1], got {density}.")
    ranked = scores.detach().abs() if absolute else scores.detach()
    flat = ranked.reshape(-1)
    count = round(density * flat.numel())
    if count == flat.numel():
        return torch.ones_like(ranked, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    # Not by `kthvalue`, which is slow on a GPU and not deterministic; nothing here waits for the device.
    border = flat.topk(count, sorted=False).values.amin()
    mask, tied = flat > border, flat == border
    return (mask | (tied & (tied.cumsum(0) <= count - mask.sum()))).reshape(scores.shape)


def two_of_four_mask(scores: Tensor) -> Tensor:
    """Return the mask of the two highest of every four consecutive scores, the pattern of sparse tensor cores.

    Rows are whole numbers of fours: groups never cross them. Among equal scores the first are on. ValueError if the
    last dimensions do not divide into fours.
    """
    if not scores.ndim or (scores.numel() // max(1, len(scores))) % 4:
        raise ValueError(f"A 2:4 mask needs rows of a multiple of four weights, got scores {tuple(scores.shape)}.")
    four, on = scores.detach().reshape(-1, 4).unbind(1), []
    for i, own in enumerate(four):
        ahead = [other >= own for other in four[:i]] + [other > own for other in four[i + 1 :]]
        on.append(torch.stack(ahead).sum(0) < 2)
    return torch.stack(on, 1).reshape(scores.shape)


def progressive_density(progress: float, final: float, start: float = 1.0) -> float:
    """Return the density on a linear schedule (the paper's progressive topk); `progress` is clipped to [0, 1]."""
    return start + (final - start) * min(max(progress, 0.0), 1.0)


MASK_TYPES: dict[str, Callable[[Tensor, MaskSpec], Tensor]] = {
    "threshold": lambda scores, spec: threshold_mask(scores, spec.threshold),
    "topk": lambda scores, spec: topk_mask(scores, spec.density, spec.absolute),
    "2:4": lambda scores, spec: two_of_four_mask(scores),
}
"""Mask types by name: scores and spec in, bool mask of the scores' shape out."""


def compute_mask(scores: Tensor, spec: MaskSpec, trainable: Tensor | None = None) -> Tensor:
    """Return the bool mask of a tensor of scores.

    `trainable` is a bool tensor of the scores' shape, True where the weight takes part; the others are always on and
    are not ranked. ``None``: all take part.
    """
    make = MASK_TYPES[spec.mask_type]
    if trainable is None:
        return make(scores, spec)
    if spec.mask_type == "threshold":
        return make(scores, spec) | ~trainable
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[trainable] = make(scores[trainable], spec)
    return mask


def density(mask: Tensor) -> float:
    """Return the fraction of a mask that is on (the paper's "sparsity")."""
    return float(torch.count_nonzero(mask)) / max(mask.numel(), 1)


def scale_of(active: Tensor, total: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute ``1/σ = sqrt(N / active)``; an empty mask counts as one active weight, so that nothing is NaN.

    Computed in fp64 where the device has it: torch's fp32 square root is not always the nearest number. `active` is a
    0-dim tensor of any dtype, `total` is N; the result is 0-dim, fp64 if `active` or `dtype` (the weights') is, else
    fp32.
    """
    count = active.clamp(min=1).to(torch.float32 if active.device.type == "mps" else torch.float64)
    # Not `total / count`: torch computes that as a reciprocal times the total, which is not 1 for all equal numbers.
    scale = torch.sqrt(torch.full_like(count, total) / count)
    return scale if torch.float64 in (active.dtype, dtype) else scale.float()


def effective_weight(weight: Tensor, mask: Tensor, scale: bool = True) -> Tensor:
    """Compute ``θ · M / σ`` (Eq. 1) without gradient, in the weight's dtype; a full mask gives θ, an empty one zeros.

    `mask` is bool and of the weight's shape; without `scale` it is ``θ · M``.
    """
    return scaled_weight(weight.detach(), mask, scale)[0]


def scaled_weight(weight: Tensor, mask: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor | float]:
    """[`effective_weight`], the number of active weights, and the factor 1/σ, 1.0 without `scale`."""
    active = torch.count_nonzero(mask)
    kept = torch.where(mask, weight, weight.new_zeros(()))
    if not scale:
        return kept, active, 1.0
    factor = scale_of(active, mask.numel(), weight.dtype)
    return kept.mul_(factor), active, factor


class _StraightThrough(torch.autograd.Function):
    """Mask of the scores forward, the identity backward: ``dL/dS := dL/dM``, not clipped (section 3.1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return mask.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scores_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.scores_dtype), None, None


def straight_through(scores: Tensor, spec: MaskSpec, dtype: torch.dtype, trainable: Tensor | None = None) -> Tensor:
    """Return the mask as zeros and ones of a float dtype that pass their gradient on to the scores.

    Where `trainable` (see [`compute_mask`]) is False the mask is one and the gradient zero.
    """
    mask = compute_mask(scores.detach(), spec, trainable)
    result: Tensor = _StraightThrough.apply(scores, mask, dtype)
    if trainable is None:
        return result
    return torch.where(trainable, result, torch.ones((), dtype=dtype, device=result.device))


def masked_weight(weight: Tensor, mask: Tensor, spec: MaskSpec) -> Tensor:
    """Compute the effective weight for autograd, with σ in the graph: Eq. 1 written out.

    `mask` is a float mask of zeros and ones from [`straight_through`], or a product of several. With ``g = dL/dθ̂`` and
    ``s = 1/σ`` autograd gives ``dL/dM_i = s·θ_i·g_i − (s²/2N)·Σ_j g_j·θ̂_j``; with ``spec.scale_gradient=False`` the
    second term is dropped.
    """
    kept = weight * mask
    if not spec.scale:
        return kept
    # The count is taken in fp32 at least: bf16 cannot count beyond 256.
    counted = mask if mask.dtype == torch.float64 else mask.float()
    scale = scale_of(counted.sum(), mask.numel())
    return kept * (scale if spec.scale_gradient else scale.detach())


def _count_off(scores: Tensor, threshold: float, trainable: Tensor | None) -> Tensor:
    """Number of weights that are off, counted exactly as a float; on a CPU in parts that fit its cache."""
    rows = max(1, _IN_CACHE * len(scores) // max(1, scores.numel())) if scores.dim() else 1
    parts = [scores] if scores.device.type != "cpu" or scores.dim() == 0 else scores.split(rows)
    chosen = [None] * len(parts) if trainable is None else [trainable] if len(parts) == 1 else trainable.split(rows)
    wide, counts = torch.float32 if scores.device.type == "mps" else torch.float64, []
    for part, taken in zip(parts, chosen, strict=True):
        off = torch.le(part, threshold, out=torch.empty_like(part, dtype=torch.float32))
        off = off if taken is None else off.mul_(taken)
        counts.append(off.sum(dtype=None if off.numel() < 2**24 else wide))  # below, float32 counts exactly
    return torch.stack([count.to(wide) for count in counts]).sum()


class _CodeLength(torch.autograd.Function):
    """See [`code_length`]. Comparisons are written as floats: on a CPU torch's bools take three times as long."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float, start: float, trainable: Tensor | None) -> Tensor:
        total = scores.numel() if trainable is None else torch.count_nonzero(trainable)
        count = _count_off(scores, threshold, trainable)
        # Half a weight at least: the first flip has a cost, and an empty mask is no NaN.
        log_off, log_on = (torch.log2(part.clamp(min=0.5) / total) for part in (count, total - count))
        ctx.save_for_backward(scores, trainable, (log_off - log_on).clamp(max=0))
        ctx.start = start
        return -(count * log_off + (total - count) * log_on)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, trainable, slope = ctx.saved_tensors
        pulled = torch.lt(scores, ctx.start, out=torch.empty_like(scores))
        pulled = pulled.mul_((grad * slope).to(pulled.dtype))
        return pulled if trainable is None else pulled.mul_(trainable), None, None, None


def code_length(scores: Tensor, threshold: float = 0.0, start: float = 1.0, trainable: Tensor | None = None) -> Tensor:
    """Compute the bits that a threshold mask takes at its entropy, ``N·H(p)`` with p the share that is off.

    Its gradient is straight through as in [`straight_through`], ``dL/dS := dL/dM = log2(p / (1 − p))``: minus what a
    weight that is off costs more than one that is on. It goes to the scores below `start` only, where they began: what
    never moved is not pushed further. This is the project's, not the paper's.

    Args:
        scores: Of any shape and float dtype.
        threshold: μ of ``1[S > μ]``.
        start: Initial score.
        trainable: As in [`compute_mask`]; the other weights take no bits.

    Returns:
        A 0-dim tensor, fp64 where the device has it. More than half of the weights off are not pushed further.
    """
    bits: Tensor = _CodeLength.apply(scores, threshold, start, trainable)
    return bits


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose stream depends on a seed and a tensor's name only, not on the order of creation."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def select_trainable(weight: Tensor, fraction: float, select: str, generator: torch.Generator) -> Tensor:
    """Select the ``round(fraction · N)`` weights of a tensor that take part in masking (the paper's Figs 8 and 9).

    `select` is ``"random"``, drawn from the CPU generator, or ``"magnitude"`` (the largest |θ|). Returns a bool tensor
    of the weight's shape and device, True where selected.
    """
    if select == "magnitude":
        return topk_mask(weight, fraction, absolute=True)
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return topk_mask(drawn, fraction).to(weight.device)
