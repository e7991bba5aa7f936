# SPDX-License-Identifier: Apache-2.0
"""The memory that steps share: one block per dtype, as large as the largest tensor asked for."""

from __future__ import annotations

import torch

from smn_peft.functional.workspace import Workspace, is_plain


def test_shapes_share_one_block_that_grows():
    workspace = Workspace()
    small = workspace.room(torch.empty(2, 3))
    assert workspace.room(torch.empty(2, 3)) is small
    assert workspace.room(torch.empty(3, 2)).data_ptr() == small.data_ptr()
    assert workspace.room(torch.empty(2, 3, dtype=torch.float64)).dtype == torch.float64
    large = workspace.room(torch.empty(4, 5))
    again = workspace.room(torch.empty(2, 3))
    assert again is not small
    assert again.shape == (2, 3)
    assert again.data_ptr() == large.data_ptr()
    assert workspace.blocks[torch.float32].numel() == 20


def test_what_is_made_in_inference_mode_serves_training():
    workspace = Workspace()
    with torch.inference_mode():
        made = workspace.room(torch.empty(2)), workspace.zero(torch.float32)
    assert not any(tensor.is_inference() for tensor in made)
    assert workspace.zero(torch.float32) is made[1]
    assert made[1].item() == 0


def test_plain_tensors():
    plain = torch.empty(2, 3)
    assert is_plain(plain, torch.nn.Parameter(plain))
    assert not is_plain(plain, plain.t())
    assert not is_plain(plain.to("meta"))
