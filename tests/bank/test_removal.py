# SPDX-License-Identifier: Apache-2.0
"""What tasks removed, taken off a shared product: against products with each task's own dense weight."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from smn_peft.bank import removal
from smn_peft.bank.task import TaskMask
from smn_peft.functional.packing import pack_bits

HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.fixture(params=["interpreted", "compiled"])
def _loops(request, monkeypatch) -> None:
    if request.param == "interpreted":
        monkeypatch.setattr(removal, "compiled", lambda *_: removal._remove)
    elif not HAS_NUMBA:
        pytest.skip("numba is not installed")


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out", "width"), [(64, 40), (37, 33), (1, 5), (96, 8)])
def test_every_run_has_its_own_weight(dtype, has_bias, out, width):
    torch.manual_seed(0)
    weight, bias = torch.randn(out, width, dtype=dtype), torch.randn(out, dtype=dtype) if has_bias else None
    counts, densities = (3, 1, 40, 5, 2), (0.9, 0.99, 0.8, None, 1.0)
    x = torch.randn(sum(counts), width, dtype=dtype)
    runs, expected = [], []
    for part, count, density in zip(x.split(counts), counts, densities, strict=True):
        if density is None:
            runs.append((None, count))
            expected.append(F.linear(part, weight, bias))
            continue
        kept = torch.rand(out, width) < density
        mask = TaskMask.from_packed("a", pack_bits(kept.view(-1)), kept.numel(), scaled=True, sparse_below=1.0)
        assert mask.removed is not None
        runs.append((mask, count))
        expected.append(F.linear(part, weight * kept * mask.scale, bias))
    product = F.linear(x, weight)
    assert removal.remove(product, x, weight, bias, runs)
    torch.testing.assert_close(product, torch.cat(expected))


@pytest.mark.usefixtures("_loops")
def test_rows_with_gaps_in_memory_are_read_right():
    torch.manual_seed(0)
    weight, x = torch.randn(20, 6), torch.randn(4, 12)[:, ::2]
    mask = TaskMask.from_packed("a", pack_bits(torch.rand(120) < 0.9), 120, scaled=True, sparse_below=1.0)
    kept = torch.ones(120).index_fill(0, mask.removed.long(), 0.0).view(20, 6)
    product = F.linear(x, weight)
    assert removal.remove(product, x, weight, None, [(mask, 4)])
    torch.testing.assert_close(product, F.linear(x, weight * kept * mask.scale))


def test_nothing_is_done_without_numba_or_on_a_transposed_weight(monkeypatch):
    weight, x = torch.randn(4, 6), torch.randn(3, 6)
    product = F.linear(x, weight)
    before = product.clone()
    assert not removal.remove(product, x, torch.randn(6, 4).t(), None, [(None, 3)])
    monkeypatch.setattr(removal, "compiled", lambda *_: None)
    assert not removal.remove(product, x, weight, None, [(None, 3)])
    torch.testing.assert_close(product, before, rtol=0, atol=0)
