# SPDX-License-Identifier: Apache-2.0
"""`passes` on a CUDA device, as kernels of Triton, which torch's CUDA builds bring: few bytes and few launches.

Every launch leaves partial sums of its own, which the next one adds up, so that results do not depend on the order in
which a device runs its blocks. Nothing waits for the device: a CUDA graph can record all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Counts", "build", "dot", "rebuild", "score_gradient"]

_BLOCK = 2048
_PARTS = 512  # partial sums at most


class Counts(NamedTuple):
    """What a forward found of a mask.

    Attributes:
        parts: int32 (≤ 512,), numbers of active weights; their sum is the mask's.
        threshold: μ, in the scores' dtype.
        scale: Whether θ·M is divided by σ.
    """

    parts: Tensor
    threshold: float
    scale: bool


@triton.jit  # type: ignore[untyped-decorator]
def _places(index: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    return (tl.program_id(0) + index * tl.num_programs(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    parts: tl.tensor, scores: tl.tensor, threshold: tl.tensor, numel: tl.tensor, rounds: tl.tensor, BLOCK: tl.constexpr
) -> None:
    active = tl.zeros((BLOCK,), dtype=tl.int32)
    for index in range(rounds):
        at = _places(index, BLOCK)
        inside = at < numel
        value = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        active += (inside & (value > threshold)).to(tl.int32)
    tl.store(parts + tl.program_id(0), tl.sum(active))


@triton.jit  # type: ignore[untyped-decorator]
def _dot(
    parts: tl.tensor, first: tl.tensor, second: tl.tensor, numel: tl.tensor, rounds: tl.tensor, BLOCK: tl.constexpr
) -> None:
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(rounds):
        at = _places(index, BLOCK)
        inside = at < numel
        one = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        total += one * tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(0), tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def _sum(parts: tl.tensor, length: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    at = tl.arange(0, PARTS)
    found = tl.load(parts + at, mask=at < length, other=0)
    return tl.sum(found.to(tl.int64) if parts.dtype.element_ty == tl.int32 else found)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(active: tl.tensor, numel: tl.tensor) -> tl.tensor:
    # Triton makes a constant of a number that is 1, and a constant has no `to`.
    return tl.sqrt((active * 0 + numel).to(tl.float64) / tl.maximum(active, 1).to(tl.float64)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _build(
    out: tl.tensor,
    weight: tl.tensor,
    scores: tl.tensor,
    counts: tl.tensor,
    threshold: tl.tensor,
    numel: tl.tensor,
    length: tl.tensor,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    at = _places(0, BLOCK)
    inside = at < numel
    kept = inside & (tl.load(scores + at, mask=inside, other=0.0).to(tl.float32) > threshold)
    # Loaded whether it is kept or not: a mask made of data would take vectors apart.
    value = tl.where(kept, tl.load(weight + at, mask=inside, other=0.0).to(tl.float32), 0.0)
    if SCALE:
        value = value * _scale(_sum(counts, length, PARTS), numel)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    out: tl.tensor,
    grad: tl.tensor,
    weight: tl.tensor,
    counts: tl.tensor,
    totals: tl.tensor,
    numel: tl.tensor,
    length: tl.tensor,
    total_length: tl.tensor,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    at = _places(0, BLOCK)
    inside = at < numel
    value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        active = _sum(counts, length, PARTS)
        value = value * _scale(active, numel)
        if SHIFT:
            value = value - _sum(totals, total_length, PARTS) / (2 * tl.maximum(active, 1)).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _blocks(numel: int) -> int:
    return -(-numel // _BLOCK)  # Triton's own cdiv is written for kernels, and slow outside


def _grid(numel: int) -> tuple[int, int]:
    """Programs that leave a partial sum each, and blocks that every one of them takes."""
    blocks = _blocks(numel)
    programs = min(blocks, _PARTS)
    return programs, -(-blocks // programs)


def build(weight: Tensor, scores: Tensor, threshold: float, scale: bool, dtype: torch.dtype) -> tuple[Tensor, Counts]:
    """Effective weight ``θ · 1[S > μ] / σ`` in two launches.

    Args:
        weight: Frozen weight θ, fp32, fp16 or bf16, dense, on a CUDA device.
        scores: Scores of the weight's shape and strides, fp32, fp16 or bf16.
        threshold: μ.
        scale: Divide by σ.
        dtype: Of the result; the product is rounded once.
    """
    if scores.dtype != torch.float32:  # as torch compares
        threshold = float(torch.tensor(threshold, dtype=scores.dtype, device="cpu"))
    programs, rounds = _grid(scores.numel())
    counts = Counts(torch.empty(programs, dtype=torch.int32, device=weight.device), threshold, scale)
    with torch.cuda.device_of(weight):
        _count[(programs,)](counts.parts, scores, threshold, scores.numel(), rounds, BLOCK=_BLOCK)
    return rebuild(weight, scores, counts, dtype), counts


def rebuild(weight: Tensor, scores: Tensor, counts: Counts, dtype: torch.dtype) -> Tensor:
    """The effective weight once more, for backward; see [`build`]."""
    out, numel = torch.empty_like(weight, dtype=dtype), weight.numel()
    parts, threshold, scale = counts
    with torch.cuda.device_of(weight):
        _build[(_blocks(numel),)](
            out, weight, scores, parts, threshold, numel, parts.numel(), SCALE=scale, BLOCK=_BLOCK, PARTS=_PARTS
        )
    return out


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Partial sums, fp32, of the elementwise product of two dense tensors of equal strides, for [`score_gradient`]."""
    programs, rounds = _grid(first.numel())
    parts = torch.empty(programs, dtype=torch.float32, device=first.device)
    with torch.cuda.device_of(first):
        _dot[(programs,)](parts, first, second, first.numel(), rounds, BLOCK=_BLOCK)
    return parts


def score_gradient(grad: Tensor, weight: Tensor, counts: Counts, totals: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dL/dS = s·θ·g − Σ g·θ̂ / (2·active)``, in the memory of `grad` where it has the dtype; one launch.

    Args:
        grad: ``g = dL/dθ̂``, of the weight's shape and strides.
        weight: Frozen weight θ.
        counts: Of the forward.
        totals: fp32 (≤ 512,), whose sum is ``Σ g·θ̂``; None where σ has no gradient.
        dtype: Of the result, rounded once.
    """
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    numel, (parts, _, scale) = weight.numel(), counts
    shifts, length = (parts, 0) if totals is None else (totals, totals.numel())
    with torch.cuda.device_of(weight):
        _gradient[(_blocks(numel),)](
            out,
            grad,
            weight,
            parts,
            shifts,
            numel,
            parts.numel(),
            length,
            SCALE=scale,
            SHIFT=totals is not None,
            BLOCK=_BLOCK,
            PARTS=_PARTS,
        )
    return out
