# SPDX-License-Identifier: Apache-2.0
"""What tests of the store share: adapters whose content follows from a number, and the check that one came back."""

from __future__ import annotations

import torch

from smn_peft.bank.source import StoredAdapter
from smn_peft.functional.packing import pack_bits
from smn_peft.storage.repack import unpack_tensors

PREFIX = "base_model.model."


def adapter(number: int, head: int = 15) -> StoredAdapter:
    """Three masks, statistics and a head of so many weights; another number, another content."""
    generator = torch.Generator().manual_seed(number)
    tensors = {
        f"{PREFIX}blocks.{layer}.fc.smn_mask": pack_bits(torch.rand(999 + layer, generator=generator) < 0.9)
        for layer in range(3)
    }
    tensors[f"{PREFIX}head.weight"] = torch.randn(head, generator=generator).view(3, -1)
    tensors[f"{PREFIX}head.bias"] = torch.randn(3, generator=generator).bfloat16()
    tensors[f"{PREFIX}norm.smn_num_batches_tracked"] = torch.tensor(number)
    config = {"peft_type": "SMN", "codec": "bits", "base_model_name_or_path": "tiny", "format_version": 1}
    return StoredAdapter({**config, "revision": str(number)}, tensors)


def assert_is(stored: StoredAdapter, expected: StoredAdapter) -> None:
    """The same config and, bit for bit, the same tensors."""
    assert stored.config == expected.config
    found = unpack_tensors(dict(stored.tensors), 1 << 20)
    assert found.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def number_of(stored: StoredAdapter) -> int:
    """The number that an adapter was made from; its head and masks are compared with what the number gives."""
    number = int(stored.config["revision"])
    head = stored.tensors[f"{PREFIX}head.weight"].numel()
    assert_is(stored, adapter(number, head))
    return number
