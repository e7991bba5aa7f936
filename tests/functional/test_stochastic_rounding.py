# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: neighbours only, right on average, the same under the same generator."""

from __future__ import annotations

import pytest
import torch

from smn_peft.functional.packing import round_stochastically


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return round_stochastically(values, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5)])
def test_every_value_goes_to_one_of_its_neighbours(shape):
    torch.manual_seed(0)
    values = torch.randn(shape) * 10 ** torch.randint(-20, 20, shape).float()
    down = (values.view(torch.int32) & -65536).view(torch.float32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    result = rounded(values)
    assert result.dtype == torch.bfloat16
    assert result.shape == shape
    assert ((result.float() == down) | (result.float() == up)).all()


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, 1e20, 1.0 + 2**-8 + 2**-12])
def test_the_mean_is_the_value(value):
    result = rounded(torch.full((200_000,), value)).double()
    standard_error = result.std() / len(result) ** 0.5
    assert abs(result.mean() - float(torch.tensor(value))) < 5 * standard_error


def test_what_is_bf16_already_and_what_is_no_number_stay():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 2.0**-133])
    for seed in range(20):
        assert torch.equal(rounded(exact, seed).float(), exact)
        assert rounded(torch.tensor([float("nan")]), seed).isnan().all()


def test_the_generator_decides():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(rounded(values, 1), rounded(values, 1))
    assert not torch.equal(rounded(values, 1), rounded(values, 2))


def test_other_layouts():
    values = torch.randn(8, 6).t()
    assert torch.equal(rounded(values), rounded(values.contiguous()))
