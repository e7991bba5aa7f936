# SPDX-License-Identifier: Apache-2.0
"""Embeddings side by side, against the formula row by row."""

from __future__ import annotations

import torch

from smn_peft.cascade.combine import conditional, unconditional


def test_both_are_the_papers_rows():
    dispatcher, experts = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(3)]
    route = torch.tensor([2, 0, 2, 2, 0])  # nothing goes to expert 1
    whole = unconditional(dispatcher, experts)
    routed = conditional(dispatcher, [expert[route == number] for number, expert in enumerate(experts)], route)
    for row in range(5):
        zeros = [torch.zeros(3)] * 3
        zeros[route[row]] = experts[route[row]][row]
        assert torch.equal(routed[row], torch.cat([dispatcher[row], *zeros]))
        assert torch.equal(whole[row], torch.cat([dispatcher[row], *(expert[row] for expert in experts)]))
