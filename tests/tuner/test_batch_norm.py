# SPDX-License-Identifier: Apache-2.0
"""The BatchNorm policy: frozen keeps the base's statistics, adapt gives every adapter its own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import timm.layers
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smn_peft import MaskConfig
from smn_peft.storage.adapter_file import adapter_sizes, read_adapter_file
from smn_peft.tuner.batch_norm import BatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:.*saved as bits", "ignore:Could not find a config file")

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ConvNet(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm0 = norm(8, **options)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 3), norm(6, **options), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.norm0(self.stem(x)).relu()).mean((2, 3)))


def net(norm: type[nn.Module] = nn.BatchNorm2d, **options) -> ConvNet:
    """A base with statistics that are not those of a fresh BatchNorm."""
    torch.manual_seed(3)
    model = ConvNet(norm, **options)
    for _ in range(3):
        model(torch.randn(8, 3, 9, 9) * 2 + 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def config(batch_norm: str = "adapt", **options) -> MaskConfig:
    return MaskConfig(target_modules="all-conv", batch_norm=batch_norm, **options)


def batch(seed: int = 0, size: int = 6) -> Tensor:
    return torch.randn(size, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def base_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): buffer.clone()
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in STATISTICS and "smn_" not in name
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def train(model: nn.Module, steps: int = 4, lr: float = 0.5, seed: int = 0) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(seed + step)).square().sum().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_a_checkpointed_batch_is_counted_once(norm, use_reentrant):
    found = []
    for checkpointed in (False, True):
        model = get_peft_model(net(norm), config()).train()
        part = model.base_model.model.block
        if checkpointed:
            forward = part.forward
            part.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=use_reentrant)
        for seed in range(2):
            model(batch(seed)).square().sum().backward()
        found.append({name: tensor for name, tensor in model.state_dict().items() if "smn_" in name})
    assert_same(*found)
    assert {int(tensor) for name, tensor in found[1].items() if "smn_num_batches" in name} == {5}


def run(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(batch(99) if x is None else x)


def reload(base: nn.Module, folder: Path, **options) -> PeftModel:
    return PeftModel.from_pretrained(base, folder, **options).eval()


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_frozen_training_leaves_the_statistics_bit_for_bit(tmp_path):
    base, model = net(), get_peft_model(net(), config("frozen"))
    train(model)
    assert model.base_model.density() < 1
    assert_same(base_statistics(model), base_statistics(base))
    model.train()
    for module in model.modules():
        assert not (isinstance(module, nn.BatchNorm2d) and module.training)
    expected = run(model.train())
    assert torch.equal(run(model.eval()), expected)
    model.save_pretrained(tmp_path)
    assert not any("running" in key or "tracked" in key for key in read_adapter_file(tmp_path))
    assert adapter_sizes(tmp_path).statistics == 0
    assert torch.equal(run(reload(net(), tmp_path)), expected)


def test_frozen_is_the_default():
    assert MaskConfig().batch_norm == "frozen"


def test_frozen_after_unload_is_the_base_s_own_batch_norm():
    model = get_peft_model(net(), config("frozen"))
    train(model)
    bare = model.unload()
    assert not any(isinstance(module, BatchNorm) for module in bare.modules())
    assert torch.equal(run(bare), run(net()))
    bare.train()
    assert bare.norm0.training


# --- adapt: training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}])
def test_adapt_trains_as_a_plain_batch_norm_on_the_same_weights(options):
    base, model = net(**options), get_peft_model(net(**options), config())
    plain = copy.deepcopy(base).train()
    plain.fc.eval()
    model.train()
    for step in range(5):
        assert torch.equal(model(batch(step)), plain(batch(step)))  # all weights are on: the base, in train mode
    norms = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, BatchNorm)}
    assert set(norms) == {"norm0", "block.1"}
    for name, wrapper in norms.items():
        for statistic in STATISTICS:
            assert torch.equal(
                wrapper.statistics(statistic)["default"], plain.get_submodule(name).get_buffer(statistic)
            )
    assert_same(base_statistics(model), base_statistics(base))
    assert torch.equal(run(model.eval()), run(plain.eval()))
    assert not torch.equal(run(model), run(base))


def test_adapt_keeps_the_statistics_of_every_adapter_apart():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    model.add_adapter("held", config("frozen"))
    train(model, seed=0)
    first = run(model)
    model.set_adapter("two")
    assert torch.equal(run(model), run(net()))
    train(model, seed=50)
    second = run(model)
    model.set_adapter("held")
    assert torch.equal(run(model), run(net()))
    train(model, lr=0.0)
    assert torch.equal(run(model), run(net()))
    for name, expected in (("one", first), ("two", second)):
        model.set_adapter(name)
        assert torch.equal(run(model), expected)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(run(model), run(net()))
        assert torch.equal(run(model.train()), run(net()))  # no adapter: nothing is re-estimated
    assert_same(base_statistics(model), base_statistics(net()))


def test_two_adapters_cannot_adapt_at_once():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"adapt the BatchNorm statistics and cannot train together.*frozen"):
        model.train()


def test_several_active_adapters_use_the_mean_of_their_statistics():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    for name in ("one", "two"):
        model.set_adapter(name)
        train(model, lr=0.0, seed=hash(name) % 7)
    model.eval()
    model.base_model.set_adapter(["one", "two"])
    reference = net()
    for name, wrapper in model.base_model.model.named_modules():
        if isinstance(wrapper, BatchNorm):
            for statistic in ("running_mean", "running_var"):
                values = [wrapper.statistics(statistic)[adapter] for adapter in ("one", "two")]
                reference.get_submodule(name).get_buffer(statistic).copy_((values[0] + values[1]) / 2)
    torch.testing.assert_close(run(model), run(reference))


# --- adapt: files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapt_saves_and_reloads_identical_logits(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(net(), config())
    train(model)
    model.save_pretrained(tmp_path)
    entries = read_adapter_file(tmp_path)
    assert sum("running_mean" in key for key in entries) == 2
    assert adapter_sizes(tmp_path).statistics == sum(2 * 4 * channels + 8 for channels in (8, 6))
    loaded = reload(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded), run(model))
    assert torch.equal(run(loaded.train()), run(model))  # an adapter for inference does not adapt
    assert torch.equal(run(loaded.eval()), run(model))
    loaded.save_pretrained(tmp_path / "again")
    first, second = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_adapt_trains_on_from_its_statistics(tmp_path):
    model = get_peft_model(net(), config(save_scores=True))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = reload(net(), tmp_path, is_trainable=True)
    assert torch.equal(run(loaded), run(model))
    train(model, seed=10)
    train(loaded, seed=10)
    assert torch.equal(run(loaded), run(model))


def test_a_loaded_adapter_switches_its_statistics(tmp_path):
    model = get_peft_model(net(), config())
    train(model)
    model.save_pretrained(tmp_path)
    host = get_peft_model(net(), config("frozen"), adapter_name="held")
    host.load_adapter(tmp_path, "task")
    assert torch.equal(run(host.eval()), run(net()))
    host.set_adapter("task")
    assert torch.equal(run(host), run(model))
    host.set_adapter("held")
    assert torch.equal(run(host), run(net()))


def test_state_dicts_round_trip_strictly():
    model = get_peft_model(net(), config())
    train(model)
    other = get_peft_model(net(), config()).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_keeps_wide_statistics(tmp_path, autocast_adapter_dtype, affine, dtype):
    def build() -> nn.Module:
        return net(affine=affine).to(dtype)

    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model, x = get_peft_model(build(), config(), **options), batch().to(dtype)
    torch.testing.assert_close(run(model.eval(), x), run(build(), x))
    model.train()
    for _ in range(3):
        model(x).float().square().sum().backward()
    model.eval()
    statistics = model.base_model.model.norm0.statistics("running_mean")["default"]
    assert statistics.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    assert not torch.equal(statistics.to(dtype), build().norm0.running_mean)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(reload(build(), tmp_path, **options), x), expected)
    torch.testing.assert_close(run(model.merge_and_unload(), x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("broken", ["missing", "shape", "dtype"])
def test_statistics_that_do_not_fit_are_refused(tmp_path, broken):
    from safetensors.torch import save_file

    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    entries = read_adapter_file(tmp_path)
    key = next(key for key in entries if "running_mean" in key)
    entries[key] = {"missing": None, "shape": torch.zeros(3), "dtype": entries[key].long()}[broken]
    save_file({k: v for k, v in entries.items() if v is not None}, tmp_path / "adapter_model.safetensors")
    message = r"do not fit this model: 1 missing" if broken == "missing" else r"running_mean is torch\..*the base has"
    with pytest.raises(ValueError, match=message):
        reload(net(), tmp_path)


# --- adapt: life cycle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["frozen", "adapt"])
def test_merging_and_unmerging(policy):
    model = get_peft_model(net(), config(policy))
    train(model)
    expected = run(model)
    model.merge_adapter()
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model.train()), expected)  # merged: nothing is re-estimated
    model.eval()
    model.unmerge_adapter()
    assert_same(base_statistics(model), base_statistics(net()))
    assert torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), run(net()))
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BatchNorm) for module in merged.modules())
    assert torch.equal(run(merged), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_merging_one_after_the_other_and_back():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    train(model)
    expected = run(model)
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    model.unmerge_adapter()
    assert_same(base_statistics(model), base_statistics(net()))
    assert torch.equal(run(model), expected)


def test_a_disabled_merged_adapter_restores_the_base():
    model = get_peft_model(net(), config())
    train(model)
    expected = run(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), run(net()))
    assert torch.equal(run(model), expected)


def test_deleting_an_adapter_deletes_its_statistics():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    train(model)
    expected = run(model)
    model.delete_adapter("two")
    assert not any("two" in name for name in model.state_dict())
    assert torch.equal(run(model), expected)


def test_a_mixed_batch_uses_each_sample_s_statistics():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config("frozen"))
    train(model)
    model.set_adapter("two")
    train(model)
    names = ["two", "one", "__base__", "one", "two", "__base__"]
    x = batch(5)
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    for name in ("one", "two"):
        model.set_adapter(name)
        chosen = [index for index, other in enumerate(names) if other == name]
        torch.testing.assert_close(mixed[chosen], run(model, x)[chosen])
    torch.testing.assert_close(mixed[[2, 5]], run(net(), x)[[2, 5]])


def test_combined_adapters_average_their_statistics():
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        train(model, seed=20 * seed)
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 3.0], "both", "majority")
    wrapper = model.base_model.model.norm0
    mean = wrapper.statistics("running_mean")
    torch.testing.assert_close(mean["both"], 0.25 * mean["one"] + 0.75 * mean["two"])
    model.set_adapter("both")
    assert torch.isfinite(run(model)).all()


def test_a_deep_copy_has_statistics_of_its_own():
    model = get_peft_model(net(), config())
    train(model)
    expected, twin = run(model), copy.deepcopy(model)
    train(twin, seed=30)
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(twin), expected)


# --- other kinds of BatchNorm ----------------------------------------------------------------------------------------


def test_modules_to_save_are_left_alone(tmp_path):
    model = get_peft_model(net(), config("frozen", modules_to_save=["norm0"]))
    train(model)
    saved = model.base_model.model.norm0.modules_to_save["default"]
    assert isinstance(saved, nn.BatchNorm2d)
    assert not torch.equal(saved.running_mean, net().norm0.running_mean)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(reload(net(), tmp_path)), run(model))
    assert adapter_sizes(tmp_path).head > 0


def test_without_running_statistics_there_is_nothing_to_hold():
    model = get_peft_model(net(track_running_stats=False), config())
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
    train(model)
    assert model.base_model.density() < 1


@pytest.mark.parametrize("policy", ["frozen", "adapt"])
def test_timm_s_batch_norm_with_activation(policy, tmp_path):
    def build() -> nn.Module:
        return net(timm.layers.BatchNormAct2d)

    model = get_peft_model(build(), config(policy)).eval()
    assert torch.equal(run(model), run(build()))
    train(model)
    assert_same(base_statistics(model), base_statistics(build()))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(reload(build(), tmp_path)), run(model))
    plain, fresh = build().train(), get_peft_model(build(), config(policy)).train()
    expected = plain(batch()) if policy == "adapt" else run(build(), batch())
    assert torch.equal(fresh(batch()), expected)


def test_a_whole_timm_model(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=3).eval()

    x = torch.randn(4, 3, 64, 64)
    model = get_peft_model(build(), MaskConfig(batch_norm="adapt"))
    norms = sum(isinstance(module, BatchNorm) for module in model.modules())
    assert norms == sum(isinstance(module, nn.BatchNorm2d) for module in build().modules())
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    expected = run(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert torch.equal(run(reload(build(), tmp_path), x), expected)
    assert not torch.equal(expected, run(build(), x))
    assert torch.equal(run(model.unload(), x), run(build(), x))


@pytest.mark.parametrize("change", ["plain", "hooked", "cumulative", "no-affine"])
def test_adapting_equals_the_base_whose_own_statistics_move(change):
    """torch's `batch_norm` is called directly, or the base as a module where that could differ."""
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=change != "no-affine"))
    base[1].momentum = None if change == "cumulative" else 0.1
    if change == "hooked":
        base[1].register_forward_hook(lambda module, args, out: out * 2)
    twin = copy.deepcopy(base)
    model = get_peft_model(base, MaskConfig(target_modules=["0"], batch_norm="adapt"))
    for net in (model.train(), twin.train()):
        torch.manual_seed(0)
        outputs = [net(torch.randn(4, 3, 2, 2)) for _ in range(3)]
        outputs.append(net.eval()(torch.ones(1, 3, 2, 2)))
        if net is model:
            mine = outputs
    for first, second in zip(mine, outputs, strict=True):
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match="expected 4D input"):
        model.base_model.model[1](torch.ones(2, 4))
