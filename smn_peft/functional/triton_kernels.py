# SPDX-License-Identifier: Apache-2.0
"""The functions of `torch_kernels` for CUDA devices, as kernels of Triton, which torch's CUDA builds bring.

Every launch leaves partial sums of its own, which the next one adds up, so that results do not depend on the order in
which a device runs its blocks. Nothing waits for the device: a CUDA graph can record all of it. Weights, scores and
results are fp32, fp16 or bf16, and are rounded once.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import torch_kernels
from .masking import MaskSpec
from .torch_kernels import have_one_order, is_dense

T: TypeAlias = tl.tensor
_BLOCK = tl.constexpr(2048)  # weights of a program's block
_PARTS = tl.constexpr(512)  # partial sums at most


class Found(NamedTuple):
    """What the forward found of a mask."""

    active: Tensor  # int32 (≤ 512,), partial sums of the number of active weights
    threshold: float  # μ, in the scores' dtype
    scale: bool


@triton.jit  # type: ignore[untyped-decorator]
def _places(index: T) -> T:
    return (tl.program_id(0) + index * tl.num_programs(0)).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _count(parts: T, scores: T, threshold: T, numel: T, rounds: T) -> None:
    active = tl.zeros((_BLOCK,), dtype=tl.int32)
    for index in range(rounds):
        at = _places(index)
        inside = at < numel
        value = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        active += (inside & (value > threshold)).to(tl.int32)
    tl.store(parts + tl.program_id(0), tl.sum(active))


@triton.jit  # type: ignore[untyped-decorator]
def _dot(parts: T, first: T, second: T, numel: T, rounds: T) -> None:
    total = tl.zeros((_BLOCK,), dtype=tl.float32)
    for index in range(rounds):
        at = _places(index)
        inside = at < numel
        one = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        total += one * tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(0), tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def _sum(parts: T, length: T) -> T:
    at = tl.arange(0, _PARTS)
    found = tl.load(parts + at, mask=at < length, other=0)
    return tl.sum(found.to(tl.int64) if parts.dtype.element_ty == tl.int32 else found)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(active: T, numel: T) -> T:
    # Triton makes a constant of a number that is 1, and a constant has no `to`.
    return tl.sqrt((active * 0 + numel).to(tl.float64) / tl.maximum(active, 1).to(tl.float64)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _build(out: T, weight: T, scores: T, counts: T, threshold: T, numel: T, length: T, SCALE: tl.constexpr) -> None:
    at = _places(0)
    inside = at < numel
    kept = inside & (tl.load(scores + at, mask=inside, other=0.0).to(tl.float32) > threshold)
    # Loaded whether it is kept or not: a mask made of data would take vectors apart.
    value = tl.where(kept, tl.load(weight + at, mask=inside, other=0.0).to(tl.float32), 0.0)
    if SCALE:
        value = value * _scale(_sum(counts, length), numel)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    out: T,
    grad: T,
    weight: T,
    counts: T,
    totals: T,
    numel: T,
    length: T,
    total_length: T,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:
    at = _places(0)
    inside = at < numel
    value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        active = _sum(counts, length)
        value = value * _scale(active, numel)
        if SHIFT:
            value = value - _sum(totals, total_length) / (2 * tl.maximum(active, 1)).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _write(out: T, weight: T, packed: T, scale: T, numel: T) -> None:
    byte = tl.program_id(0).to(tl.int64) * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)
    bits = tl.load(packed + byte, mask=byte * 8 < numel, other=0).to(tl.int32)[:, None]
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    inside = at < numel
    value = tl.load(weight + at, mask=inside, other=0.0)
    kept = tl.where(((bits >> (7 - bit)) & 1) != 0, value.to(tl.float32) * scale, 0.0)
    tl.store(out + at, kept.to(value.dtype), mask=inside)


def _blocks(numel: int) -> int:
    return -(-numel // int(_BLOCK.value))  # Triton's own cdiv is written for kernels, and slow outside


def _grid(numel: int) -> tuple[int, int]:
    """Programs that leave a partial sum each, and blocks that every one of them takes."""
    blocks = _blocks(numel)
    programs = min(blocks, _PARTS.value)
    return programs, -(-blocks // programs)


def build(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: None, dtype: torch.dtype) -> tuple[Tensor, Found]:
    """See `torch_kernels.build`; two launches."""
    threshold = spec.threshold
    if scores.dtype != torch.float32:  # as torch compares
        threshold = float(torch.tensor(threshold, dtype=scores.dtype, device="cpu"))
    programs, rounds = _grid(scores.numel())
    found = Found(torch.empty(programs, dtype=torch.int32, device=weight.device), threshold, spec.scale)
    with torch.cuda.device_of(weight):
        _count[(programs,)](found.active, scores, threshold, scores.numel(), rounds)
    return rebuild(weight, scores, spec, trainable, found, dtype)[0], found


def rebuild(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: None, found: Found, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """See `torch_kernels.rebuild`."""
    out, numel = torch.empty_like(weight, dtype=dtype), weight.numel()
    parts, threshold, scale = found
    with torch.cuda.device_of(weight):
        _build[(_blocks(numel),)](out, weight, scores, parts, threshold, numel, parts.numel(), SCALE=scale)
    return out, 1.0


def inner(first: Tensor, second: Tensor) -> Tensor:
    """See `torch_kernels.inner`: partial sums, fp32 (≤ 512,), for [`score_gradient`]."""
    if not (have_one_order(first, second) and is_dense(first)):
        return torch_kernels.inner(first, second)
    programs, rounds = _grid(first.numel())
    parts = torch.empty(programs, dtype=torch.float32, device=first.device)
    with torch.cuda.device_of(first):
        _dot[(programs,)](parts, first, second, first.numel(), rounds)
    return parts


def score_gradient(
    grad: Tensor, weight: Tensor, trainable: None, found: Found, total: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `torch_kernels.score_gradient`; one launch."""
    if not have_one_order(grad, weight):
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    numel, parts = weight.numel(), found.active
    shifts, length = (parts, 0) if total is None else (total, total.numel())
    sizes = numel, parts.numel(), length
    with torch.cuda.device_of(weight):
        _gradient[(_blocks(numel),)](
            out, grad, weight, parts, shifts, *sizes, SCALE=found.scale, SHIFT=total is not None
        )
    return out


def write_masked(out: Tensor, weight: Tensor, packed: Tensor, scale: float) -> None:
    """See `effective.write_masked`."""
    numel = out.numel()
    with torch.cuda.device_of(out):
        _write[(_blocks(numel),)](out, weight, packed, scale, numel)
