# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of base weights: the same for the same values, another for one bit."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.storage.fingerprint import fingerprint, tensor_digest


def test_a_digest_is_of_dtype_shape_and_values():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        digest = tensor_digest(tensor)
        assert tensor_digest(tensor.clone()) == digest
        assert tensor_digest(nn.Parameter(tensor.clone())) == digest
        assert tensor_digest(tensor.t().contiguous().t()) == digest  # the layout in memory does not count
        assert tensor_digest(tensor.reshape(6, 4)) != digest
        assert tensor_digest(tensor.view(torch.uint8)) != digest
    for shape in ((), (0,), (3, 0)):
        assert tensor_digest(torch.zeros(shape)) == tensor_digest(torch.zeros(shape))
        assert tensor_digest(torch.zeros(shape)) != tensor_digest(torch.zeros((*shape, 1)))


def test_one_bit_changes_a_digest():
    tensor = torch.zeros(100)
    seen = {tensor_digest(tensor)}
    for index in (0, 50, 99):
        for bit in (0, 15, 31):
            changed = tensor.clone()
            changed.view(torch.int32)[index] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(tensor_digest(changed))
    assert len(seen) == 10  # -0.0 counts too


def test_a_digest_is_the_same_on_every_machine():
    # Adapters on the Hub hold fingerprints: what they are made from must not change.
    digest = tensor_digest(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    assert digest == "84c5528b38cba35b6e87acb2715399cd230071d820ed906d3bb743a985372647"
    assert fingerprint([digest], torch.float32) == "float32:63ecba4bba306f7536d6d44103d1dbb4"


def test_order_does_not_count_but_the_dtype_stands_in_front():
    digests = [tensor_digest(torch.full((2,), float(value))) for value in range(5)]
    whole = fingerprint(digests, torch.float32)
    assert fingerprint(reversed(digests), torch.float32) == whole
    assert fingerprint(iter(digests), torch.float32) == whole
    assert whole.startswith("float32:")
    assert len(whole) == len("float32:") + 32
    assert fingerprint(digests, torch.bfloat16) == "bfloat16:" + whole.partition(":")[2]
    assert fingerprint(digests[:-1], torch.float32) != whole
    assert fingerprint([*digests, digests[0]], torch.float32) != whole


class Net(nn.Module):
    def __init__(self, first: str = "fc1", second: str = "fc2") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = first, second
        setattr(self, first, nn.Linear(5, 7))
        setattr(self, second, nn.Linear(7, 3))

    def forward(self, x):
        return getattr(self, self.names[1])(getattr(self, self.names[0])(x))


def saved_fingerprint(net: nn.Module, folder, **options) -> str:
    model = get_peft_model(net, MaskConfig(target_modules=r"(fc1|fc2|other1|other2)", **options))
    model.save_pretrained(folder)
    return model.peft_config["default"].base_fingerprint


def test_the_fingerprint_of_an_adapter_is_of_its_masked_weights(tmp_path):
    expected = saved_fingerprint(Net(), tmp_path)
    assert saved_fingerprint(Net("other1", "other2"), tmp_path) == expected  # names do not count
    assert saved_fingerprint(Net(), tmp_path, mask_bias=True) != expected
    shifted, flipped = Net(), Net()
    with torch.no_grad():
        shifted.fc1.bias.add_(1)
        flipped.fc1.weight.view(torch.int32)[2, 3] ^= 1
    assert saved_fingerprint(shifted, tmp_path) == expected  # biases are not masked here
    assert saved_fingerprint(flipped, tmp_path) != expected
    assert saved_fingerprint(Net().bfloat16(), tmp_path).startswith("bfloat16:")


def test_an_edit_of_the_base_after_the_first_save_is_noticed(tmp_path):
    model = get_peft_model(Net(), MaskConfig(target_modules=["fc1"]))
    model.save_pretrained(tmp_path)
    first = model.peft_config["default"].base_fingerprint
    with torch.no_grad():
        model.base_model.model.fc1.base_layer.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_fingerprint != first


def test_merged_weights_are_not_fingerprinted(tmp_path):
    model = get_peft_model(Net(), MaskConfig(target_modules=["fc1"], init_weights=False))
    model.save_pretrained(tmp_path)
    first = model.peft_config["default"].base_fingerprint
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_fingerprint == first
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_fingerprint == first
