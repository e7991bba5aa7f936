# SPDX-License-Identifier: Apache-2.0
"""Mixed batches by `adapter_names`: once per adapter, or row by row in models that generate; never a wrong answer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

from smn_peft import MaskConfig

NAMES = ["one", "__base__", "two", "one"]
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Rows(NamedTuple):
    rows: Tensor
    constant: Tensor


class Awkward(nn.Module):
    """Folds tokens into the batch, puts them before it, and reads a weight."""

    generates = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.read, self.last = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )

    def can_generate(self) -> bool:
        return self.generates

    def forward(self, x: Tensor, kind: str = "dict") -> object:
        x = self.norm(self.first(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        x = self.last(x.transpose(0, 1)).transpose(0, 1) + F.linear(x, self.read.weight)[..., :4]
        found = [{"boxes": one[: index + 1]} for index, one in enumerate(x)]
        out = {"dict": {"rows": x, "maps": [x.sum(1)]}, "named": Rows(x, torch.ones(3)), "found": found}
        return {**out, "loss": {"loss": x.mean()}, "object": {"cache": object()}}[kind]


def masked(base: nn.Module | None = None, **options) -> PeftModel:
    options = {"target_modules": ["first", "read", "last"], "init_weights": False, "batch_norm": "adapt", **options}
    model = get_peft_model(base or Awkward(), MaskConfig(**options), adapter_name="one")
    model.add_adapter("two", MaskConfig(**options, seed=2, inference_mode=True))
    return model.eval()


def alone(model: PeftModel, name: str, *args, **kwargs) -> object:
    if name == "__base__":
        with model.disable_adapter():
            return model(*args, **kwargs)
    model.set_adapter(name)
    return model(*args, **kwargs)


@torch.no_grad()
def test_every_sample_has_its_adapter_in_whatever_container():
    model = masked()
    expected = torch.stack([alone(model, name, X)["rows"][row] for row, name in enumerate(NAMES)])
    model.set_adapter("two")
    out = model(X, adapter_names=NAMES)
    torch.testing.assert_close(out["rows"], expected)
    torch.testing.assert_close(out["maps"][0], expected.sum(1))
    named = model(x=X, kind="named", adapter_names=NAMES)
    assert type(named) is Rows
    torch.testing.assert_close(named.rows, expected)
    assert torch.equal(named.constant, torch.ones(3))
    found = model(X, kind="found", adapter_names=NAMES)
    assert len(found) == 4
    torch.testing.assert_close(found[3]["boxes"][0], expected[3][0])
    torch.testing.assert_close(model(X)["rows"], alone(model, "two", X)["rows"])  # the names hold for one call


@pytest.mark.parametrize(("kind", "what"), [("loss", "tensors of shapes"), ("object", "a object")])
def test_an_output_without_rows_is_refused(kind, what):
    model = masked()
    with pytest.raises(ValueError, match=rf"returned {what}.* leave out labels.*one batch per adapter"):
        model(X, kind=kind, adapter_names=NAMES)
    assert model(X)["rows"].shape == (4, 6, 4)  # nothing is left in force


def test_windows_of_a_transformers_model():
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)
    model = masked(SwinForImageClassification(config), target_modules=None)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        mixed = model(images, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(mixed[row], alone(model, name, images).logits[row])


# --- Models that generate: rows are told apart in every layer --------------------------------------------------------


class Generating(Awkward):
    generates = True


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["first"], r"in 'first': it is given 24 rows for 4 samples.*MaskBank\.forward"),
        (["norm"], r"in 'norm': it is given 24 rows"),
        (["last"], r"in 'last': it is given 6 rows"),
        (["read"], r"takes the weight of 'read' and does not call the layer.*MaskBank\.forward"),
    ],
    ids=str,
)
def test_what_cannot_be_told_apart_is_refused(targets, message):
    adapts = "adapt" if targets == ["norm"] else "frozen"
    with torch.device("cpu"):
        base = Generating()
    if targets != ["norm"]:
        base.norm = nn.Identity()
        model = masked(base, target_modules=targets, batch_norm=adapts)
    else:
        model = masked(base, target_modules=["read"], batch_norm=adapts)
    with pytest.raises(ValueError, match=message):
        model(X, adapter_names=NAMES)


@torch.no_grad()
def test_a_weight_tells_its_dtype_and_serves_rows_of_one_adapter():
    class Read(Generating):
        def forward(self, x: Tensor) -> Tensor:
            assert (self.read.weight.dtype, self.read.weight.shape, len(self.read.weight)) == (x.dtype, (8, 8), 8)
            assert self.read.weight.device == x.device and not self.read.weight.is_complex()  # noqa: PT018
            return self.read(x)

    model = masked(Read(), target_modules=["read"])
    expected = torch.stack([alone(model, name, X)[row] for row, name in enumerate(NAMES)])
    torch.testing.assert_close(model(X, adapter_names=NAMES), expected)
    base = Generating()
    base.norm = nn.Identity()
    model = masked(base, target_modules=["read"])
    torch.testing.assert_close(model(X, adapter_names=["two"] * 4)["rows"], alone(model, "two", X)["rows"])


@pytest.mark.parametrize(
    "take", [torch.Tensor.sum, torch.Tensor.clone, lambda w: w.T, lambda w: w.data, lambda w: w @ w, bool]
)
def test_a_weight_tells_nothing_else(take):
    class Read(Generating):
        def forward(self, x: Tensor) -> Tensor:
            take(self.read.weight)
            return self.read(x)

    model = masked(Read(), target_modules=["read"])
    with pytest.raises(ValueError, match="does not call the layer"):
        model(X, adapter_names=NAMES)


@pytest.mark.parametrize("inner", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_a_compiled_model_mixes_too(inner):
    torch._dynamo.reset()
    model = masked()
    plain, mixed = model(X)["rows"], model(X, adapter_names=NAMES)["rows"]
    if inner:
        model.base_model.model.compile(backend="eager")
    run = model if inner else torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(run(X)["rows"], plain)
        torch.testing.assert_close(run(X, adapter_names=NAMES)["rows"], mixed)
