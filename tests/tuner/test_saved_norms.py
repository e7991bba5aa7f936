# SPDX-License-Identifier: Apache-2.0
"""BatchNorms inside `modules_to_save` beside an adapter that wraps every BatchNorm; one BatchNorm in two places."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from smn_peft import MaskConfig
from smn_peft.tuner.wrapper import AdapterLayer

from .nets import TwoNorms

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


class Twice(nn.Module):
    """One BatchNorm under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(x)))


def config(saved: list[str] | None = None, batch_norm: str = "frozen") -> MaskConfig:
    return MaskConfig(
        target_modules=["enc.0"],
        init_weights=False,
        modules_to_save=saved,
        batch_norm=batch_norm,
        inference_mode=False,
    )


def moved(model: PeftModel) -> torch.Tensor:
    """Outputs in eval mode, after a while in train mode that leaves no statistics that train where they were."""
    model.train()
    for _ in range(3):
        model(X)
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("saved", [["head"], ["enc.1"], ["head", "enc.1"]], ids="-".join)
@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
def test_a_second_adapter_s_copies_are_the_base_s(saved, batch_norm, tmp_path: Path):
    model = get_peft_model(TwoNorms(), config(batch_norm=batch_norm), adapter_name="one")
    first = moved(model)
    model.add_adapter("two", config(saved, batch_norm))
    model.set_adapter("two")
    second = moved(model)
    copies = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(copies) == len(saved)
    assert not any(isinstance(m, AdapterLayer) for copy in copies for m in copy.modules_to_save.modules())
    steps = [int(b) for n, b in model.named_buffers() if "to_save.two" in n and n.endswith("num_batches_tracked")]
    assert steps == [3] * len(saved)
    model.save_pretrained(tmp_path)
    for name, expected in (("one", first), ("two", second)):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(TwoNorms(), tmp_path / name, adapter_name=name).eval()
        beside = get_peft_model(TwoNorms(), config(batch_norm=batch_norm), adapter_name="other")
        beside.load_adapter(tmp_path / name, name)
        beside.set_adapter(name)
        with torch.no_grad():
            for each in (model.eval(), alone, beside.eval()):
                assert torch.equal(each(X), expected)


@pytest.mark.parametrize("active", ["one", "two"])
def test_nothing_stays_wrapped_and_what_was_active_is_merged(active):
    model = get_peft_model(TwoNorms(), config(batch_norm="adapt"), adapter_name="one")
    moved(model)
    model.add_adapter("two", config(["head"]))
    model.set_adapter(active)
    with torch.no_grad():
        expected = model.eval()(X)
        plain = model.merge_and_unload()
        assert not any(isinstance(m, AdapterLayer) for m in plain.modules())
        torch.testing.assert_close(plain.eval()(X), expected)


def test_a_failed_second_adapter_leaves_the_first(tmp_path):
    model = get_peft_model(TwoNorms(), config(batch_norm="adapt"), adapter_name="one")
    expected = moved(model)
    with pytest.raises(ValueError, match="norm layer"):
        model.add_adapter("two", MaskConfig(target_modules=["enc.1"], modules_to_save=["head"]))
    assert list(model.peft_config) == ["one"]
    with torch.no_grad():
        assert torch.equal(model.eval()(X), expected)


@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
def test_one_batch_norm_in_two_places(batch_norm, tmp_path):
    model = get_peft_model(Twice(), MaskConfig(target_modules=["conv"], init_weights=False, batch_norm=batch_norm))
    expected = moved(model)
    base = model.base_model.model
    assert base.first is base.second
    assert int(base.first.get_base_layer().num_batches_tracked) == 0
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # no key is missing
        assert torch.equal(PeftModel.from_pretrained(Twice(), tmp_path).eval()(X), expected)
