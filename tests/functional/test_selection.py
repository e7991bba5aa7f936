# SPDX-License-Identifier: Apache-2.0
"""Which weights take part: exact counts, reproducible draws, the largest first."""

from __future__ import annotations

import pytest
import torch

from smn_peft.functional.masking import seeded_generator, select_trainable


def draw(seed: int, name: str) -> torch.Tensor:
    return torch.rand(8, generator=seeded_generator(seed, name))


def test_a_generator_depends_on_seed_and_name_only():
    first = draw(1, "a.weight")
    torch.manual_seed(99)
    assert torch.equal(draw(1, "a.weight"), first)
    assert not torch.equal(draw(2, "a.weight"), first)
    assert not torch.equal(draw(1, "b.weight"), first)
    assert not torch.equal(draw(11, "a"), draw(1, "1a"))
    before = torch.get_rng_state()
    draw(3, "c")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_is_the_same_on_every_machine():
    assert seeded_generator(0, "x").initial_seed() == 8599623748626867949  # adapters without scores depend on it
    seeds = {seeded_generator(seed, name).initial_seed() for seed in range(20) for name in ("a", "b", "ä")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("select", ["random", "magnitude"])
def test_exactly_the_fraction_is_selected(select):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for fraction in (0.001, 0.009, 0.1, 0.5, 0.999, 1.0):
            weight = torch.randn(31, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
            chosen = select_trainable(weight, fraction, select, seeded_generator(0, "w"))
            assert chosen.dtype == torch.bool
            assert chosen.shape == weight.shape
            assert int(chosen.sum()) == round(fraction * weight.numel())
            again = select_trainable(weight, fraction, select, seeded_generator(0, "w"))
            assert torch.equal(chosen, again)


def test_magnitude_selects_the_largest_by_absolute_value():
    weight = torch.tensor([[-5.0, 1.0], [2.0, -3.0]])
    chosen = select_trainable(weight, 0.5, "magnitude", seeded_generator(0, "w"))
    assert chosen.tolist() == [[True, False], [False, True]]


def test_random_selection_ignores_the_weights_and_spreads():
    first = select_trainable(torch.randn(100, 100), 0.3, "random", seeded_generator(5, "w"))
    second = select_trainable(torch.zeros(100, 100), 0.3, "random", seeded_generator(5, "w"))
    assert torch.equal(first, second)
    other = select_trainable(torch.zeros(100, 100), 0.3, "random", seeded_generator(6, "w"))
    assert 0.05 < float((first & other).float().mean()) < 0.13
    assert (first.float().mean(0) - 0.3).abs().max() < 0.25


def test_a_larger_fraction_contains_the_smaller():
    weight = torch.randn(50, 20)
    for select in ("random", "magnitude"):
        small = select_trainable(weight, 0.2, select, seeded_generator(1, "w"))
        large = select_trainable(weight, 0.6, select, seeded_generator(1, "w"))
        assert bool(large[small].all())
