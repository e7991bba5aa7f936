# SPDX-License-Identifier: Apache-2.0
"""Fifty resident adapters: all of them work, and state dicts do not grow with their number."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smn_peft import MaskConfig

COUNT = 50
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(6)]
    return nn.Sequential(*layers, nn.BatchNorm1d(16)).eval()


def config(seed: int) -> MaskConfig:
    return MaskConfig(target_modules=r"\d", exclude_modules=["6"], init_weights=False, seed=seed, batch_norm="adapt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[list[Path], list[Tensor]]:
    root, paths, outputs = tmp_path_factory.mktemp("adapters"), [], []
    for seed in range(COUNT):
        model = get_peft_model(net(), config(seed))
        with torch.no_grad():
            model.train()(X + seed)  # statistics of its own
            outputs.append(model.eval()(X))
        paths.append(root / str(seed))
        model.save_pretrained(paths[-1])
    return paths, outputs


def sizes(model: nn.Module) -> tuple[int, int, int]:
    return len(model.state_dict()), len(list(model.named_buffers())), len(list(model.named_parameters()))


def test_fifty_resident_adapters(folders, tmp_path):
    paths, outputs = folders
    model = PeftModel.from_pretrained(net(), paths[0], adapter_name="task0").eval()
    loads, switches = [], []
    for index in range(1, COUNT):
        start = time.perf_counter()
        model.load_adapter(paths[index], f"task{index}")
        loads.append(time.perf_counter() - start)
        if index == 1:
            small = sizes(model)
    assert sizes(model) == small
    with torch.no_grad():
        for index in reversed(range(COUNT)):
            start = time.perf_counter()
            model.set_adapter(f"task{index}")
            switches.append(time.perf_counter() - start)
            assert torch.equal(model(X), outputs[index])
    print(f"load, last five over first five: {sum(loads[-5:]) / sum(loads[:5]):.2f}")
    print(f"switch, last five over first five: {sum(switches[-5:]) / sum(switches[:5]):.2f}")

    names = [f"task{index}" for index in (7, 31, 7)]
    with torch.no_grad():
        mixed = model(X, adapter_names=names)
    for row, index in enumerate((7, 31, 7)):
        torch.testing.assert_close(mixed[row], outputs[index][row])

    model.save_pretrained(tmp_path, selected_adapters=["task3"])
    saved, original = (folder / "adapter_model.safetensors" for folder in (tmp_path / "task3", paths[3]))
    assert saved.read_bytes() == original.read_bytes()

    for index in range(COUNT - 1, 0, -1):  # the newest first: the one before it takes its place
        model.delete_adapter(f"task{index}")
    assert sizes(model) == small
    assert list(model.peft_config) == ["task0"]
    with torch.no_grad():
        assert torch.equal(model(X), outputs[0])


def test_moving_the_model_moves_the_resident_adapters(folders):
    paths, outputs = folders
    model = PeftModel.from_pretrained(net(), paths[0], adapter_name="task0").eval()
    for index in (1, 2):
        model.load_adapter(paths[index], f"task{index}")
    model.double()
    for index in (0, 1, 2):
        model.set_adapter(f"task{index}")
        with torch.no_grad():
            torch.testing.assert_close(model(X.double()).float(), outputs[index], rtol=1e-4, atol=1e-4)


def test_a_state_dict_restores_the_older_adapters_it_names(folders):
    paths, outputs = folders
    model = PeftModel.from_pretrained(net(), paths[0], adapter_name="task0").eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = PeftModel.from_pretrained(net(), paths[4], adapter_name="task0").eval()
    other.load_adapter(paths[5], "task5")
    missing = other.load_state_dict(state, strict=False).missing_keys
    assert all("task5" in key for key in missing)
    with torch.no_grad():
        assert torch.equal(other(X), outputs[0])
