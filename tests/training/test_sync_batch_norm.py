# SPDX-License-Identifier: Apache-2.0
"""Synchronised BatchNorm in whole models: two processes equal one, and nothing else about the model changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from peft import get_peft_model
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smn_peft import MaskConfig
from smn_peft.functional.distributed import process_count, process_index
from smn_peft.objectives.swav import ProjectionHead
from smn_peft.training.processes import SynchronisedBatchNorm, synchronise_batch_norm
from tests.gloo import run_processes

BATCH = 8


def timm_mobile() -> nn.Module:
    """BatchNorms with an activation inside."""
    return timm.create_model("test_efficientnet", num_classes=0)


def resnet() -> nn.Module:
    return timm.create_model("resnet18", channels=(4, 8, 8, 8), num_classes=0)


def masked(batch_norm: str, base: Callable[[], nn.Module] = resnet) -> nn.Module:
    return get_peft_model(base(), MaskConfig(target_modules="all-conv", batch_norm=batch_norm))


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(1), ProjectionHead("mlp", 48, 16, 6).projection)


def cumulative() -> nn.Module:
    """Momentum None means the running mean over all batches; the other tracks nothing."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False, affine=False),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.BatchNorm1d(4)),
    "cumulative": cumulative,
    "projection head": head,
    "masked, adapt": lambda: masked("adapt"),
    "masked, frozen": lambda: masked("frozen"),
    "masked, activation inside": lambda: masked("adapt", timm_mobile),
}


def build(name: str) -> nn.Module:
    """The model in double precision, so that deep models compare tightly."""
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def two_steps(name: str) -> dict[str, Tensor]:
    """Output, gradients and state after two forwards and backwards on this process's slice."""
    model = build(name)
    if process_count() > 1:
        synchronise_batch_norm(model)
    share = BATCH // process_count()
    mine = slice(process_index() * share, (process_index() + 1) * share)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) + 1
        images = images[mine].requires_grad_()
        y = model(images)
        (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).pow(2).sum().backward()
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    state = {f"state {n}": t for n, t in model.state_dict().items()}
    return {"rows y": y.detach(), "rows dx": images.grad} | gradients | state


def all_models() -> dict[str, Tensor]:
    return {f"{name}: {key}": value for name in MODELS for key, value in two_steps(name).items()}


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    one, ranks = all_models(), run_processes(all_models, 2, tmp_path)
    moved = 0
    for name, expected in one.items():
        parts = [rank[name] for rank in ranks]
        if ": rows" in name:
            found = torch.cat(parts)
        elif ": grad" in name:  # DDP would sum or average these
            found = sum(parts)
        else:
            assert torch.equal(*parts), name
            found = parts[0]
            moved += "running_mean" in name and bool(expected.any())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert moved > 20, "the running statistics were never compared"


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_the_class_changes(name):
    model = build(name)
    model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    modules, tensors = list(model.modules()), model.state_dict(keep_vars=True)
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    modes, twin = [m.training for m in modules], copy.deepcopy(model)
    assert synchronise_batch_norm(model) is model
    assert synchronise_batch_norm(model) is model, "twice is once"
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[key] is tensors[key] and torch.equal(after[key], before[key]) for key in tensors)
    assert {type(norm) for norm in norms_of(model)} == {SynchronisedBatchNorm}
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(model(x), twin(x)), "one process computes what it did"
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert torch.equal(copy.deepcopy(model)(x), twin(x))


def test_an_adapter_saves_and_loads_as_before(tmp_path):
    model = build("masked, adapt").float()
    synchronise_batch_norm(model)
    model(torch.randn(4, 3, 32, 32))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    torch.manual_seed(0)
    other = masked("adapt")
    other.load_adapter(tmp_path / "adapter", "loaded")
    other.set_adapter("loaded")
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_torchs_own_synchronised_norm_works_on_the_cpu_too():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    synchronise_batch_norm(model)
    assert type(model[1]) is SynchronisedBatchNorm
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_the_activation_of_timm_is_kept():
    norm = BatchNormAct2d(4)
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(norm)(x)
    assert torch.equal(synchronise_batch_norm(norm)(x), expected)
    assert expected.min() == 0


def test_a_norm_with_a_forward_of_its_own_is_refused_and_nothing_changes():
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    with pytest.raises(TypeError, match=r"1 is a Odd, which cannot be synchronised over processes: use nn.BatchNorm"):
        synchronise_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="The module is a LazyBatchNorm2d"):
        synchronise_batch_norm(nn.LazyBatchNorm2d())


def test_input_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"takes \(batch, channels, …\), got \(3,\)"):
        synchronise_batch_norm(nn.BatchNorm1d(3))(torch.zeros(3))
