# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp against a plain float64 loop, at extreme values, under autocast, and over two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smn_peft.functional.distributed import (
    all_reduce,
    gather_rows,
    process_count,
    process_index,
    sinkhorn,
)
from tests.gloo import run_processes


def reference(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The algorithm as SwAV's paper states it: columns to 1/K, rows to 1/B, then codes that sum to 1."""
    q = np.exp(scores.astype(np.float64) / epsilon)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    return q * q.shape[0]


def scores_of(batch: int, prototypes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, prototypes, generator=generator) * 2 - 1


@pytest.mark.parametrize(("batch", "prototypes"), [(64, 30), (30, 64), (1, 5), (5, 1), (576, 500)])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.05, 1), (0.25, 10)])
def test_equals_the_float64_loop(batch, prototypes, epsilon, iterations):
    scores = scores_of(batch, prototypes)
    codes = sinkhorn(scores, epsilon, iterations)
    expected = torch.from_numpy(reference(scores.numpy(), epsilon, iterations))
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.double(), expected, rtol=5e-5, atol=1e-7)
    torch.testing.assert_close(codes.sum(1), torch.ones(batch), rtol=0, atol=1e-5)


def test_defaults_are_those_of_swav():
    scores = scores_of(8, 4)
    assert torch.equal(sinkhorn(scores), sinkhorn(scores, epsilon=0.05, iterations=3))


def test_many_iterations_use_every_prototype_equally():
    codes = sinkhorn(scores_of(60, 12), epsilon=0.5, iterations=200)
    torch.testing.assert_close(codes.sum(0), torch.full((12,), 5.0), rtol=1e-4, atol=0)


def test_equal_rows_get_uniform_codes():
    codes = sinkhorn(scores_of(1, 10).expand(16, 10))
    torch.testing.assert_close(codes, torch.full((16, 10), 0.1))


@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 1e-3), (1e4, 0.05), (1.0, 1e-4)])
def test_extreme_scores_stay_finite(scale, epsilon):
    scores = scores_of(16, 8) * scale
    scores[3], scores[:, 5] = scores[3] - 10 * scale, scores[:, 5] - 10 * scale  # a far row, a far column
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(reference(scores.numpy(), epsilon, 3)).all(), "the plain loop would have done"
    codes = sinkhorn(scores, epsilon)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(16))


def test_a_shift_of_all_scores_changes_nothing():
    scores = scores_of(16, 8)
    torch.testing.assert_close(sinkhorn(scores + 64), sinkhorn(scores), rtol=1e-3, atol=1e-5)


def test_computes_in_fp32_under_autocast_and_from_bf16():
    scores = scores_of(32, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores)
    assert codes.dtype == torch.float32
    expected = torch.from_numpy(reference(scores.double().numpy(), 0.05, 3))
    torch.testing.assert_close(codes.double(), expected, rtol=5e-5, atol=1e-7)


def test_leaves_its_input_alone_and_gives_no_gradient():
    scores = scores_of(8, 4).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, r"\(batch, prototypes\) with entries, got \(4,\)"),
        ((0, 4), {}, r"got \(0, 4\)"),
        ((4, 4), {"epsilon": 0.0}, "epsilon must be above 0 .*, got 0.0"),
        ((4, 4), {"epsilon": float("nan")}, "epsilon must be above 0"),
        ((4, 4), {"iterations": 0}, "iterations at least 1, got 0.05 and 0"),
    ],
)
def test_bad_input_is_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(shape), **options)


def on_one_rank(scores: Tensor) -> dict[str, Tensor]:
    """Codes of this rank's unequal share, and the helpers' results."""
    rank = process_index()
    share = scores[:10] if rank == 0 else scores[10:]
    rows = torch.tensor([[rank, 10.0]])
    return {
        "codes": sinkhorn(share),
        "sum": all_reduce(rows.clone()),
        "max": all_reduce(rows.clone(), "max"),
        "rows": gather_rows(rows),
        "columns": gather_rows(rows.T[::2].requires_grad_(), dim=1),
        "count": torch.tensor(process_count()),
    }


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    scores = scores_of(32, 12)
    scores[20] += 300  # the largest score is on the second process only
    ranks = run_processes(on_one_rank, 2, tmp_path, scores)
    torch.testing.assert_close(torch.cat([r["codes"] for r in ranks]), sinkhorn(scores), rtol=1e-4, atol=1e-6)
    for result in ranks:
        assert result["count"] == 2
        assert result["sum"].tolist() == [[1.0, 20.0]]
        assert result["max"].tolist() == [[1.0, 10.0]]
        assert result["rows"].tolist() == [[0.0, 10.0], [1.0, 10.0]]
        assert result["columns"].tolist() == [[0.0, 1.0]]
    alone = sinkhorn(scores[:10])
    assert (alone - ranks[0]["codes"]).abs().max() > 0.1, "the processes' batches would not have mattered"
