# SPDX-License-Identifier: Apache-2.0
"""Switching tasks in a plain model's memory: the same logits as PEFT's adapter, and the base back bit for bit."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import timm
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from smn_peft import MaskConfig
from smn_peft.bank.live import LiveModel, LiveTensor
from smn_peft.bank.reading import task_from_tensors
from smn_peft.bank.task import SPARSE_BELOW, BankStats, TaskMask
from smn_peft.functional.effective import write_masked
from smn_peft.functional.packing import pack_bits
from tests.bank.tiny import IMAGES, adapter, build, state_of


@pytest.mark.parametrize(("name", "batch_norm"), [("vit", "frozen"), ("resnet", "adapt")])
def test_every_task_gives_its_own_logits_and_the_base_comes_back(name, batch_norm):
    base = build(name)
    before, addresses = state_of(base), {k: p.data_ptr() for k, p in base.named_parameters()}
    live = LiveModel(base, BankStats())
    made = [adapter(name, density, i, batch_norm=batch_norm) for i, density in enumerate((0.999, 0.6, 0.99))]
    tasks = [task_from_tensors(f"t{i}", tensors, live) for i, (tensors, _) in enumerate(made)]
    with torch.no_grad():
        own = base(IMAGES)
        expected = [model(IMAGES) for _, model in made]
        assert min(float((logits - own).abs().max()) for logits in expected) > 0.01
        for i in (0, 1, 2, 0, 1, None, 2, 0):
            live.switch(None if i is None else tasks[i])
            torch.testing.assert_close(base(IMAGES), own if i is None else expected[i], rtol=1e-4, atol=1e-4)
    live.switch(None)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    masked = {key for task in tasks for key in task.masks}
    assert all(base.get_parameter(key).data_ptr() == addresses[key] for key in masked)
    live.close()
    assert torch.equal(base(IMAGES), own)


def test_a_task_finds_the_base_where_the_last_one_masked_and_it_does_not():
    live = LiveModel(build("vit"), BankStats())
    kinds = enumerate(product((0.99, 0.6), (["fc1", "fc2"], ["qkv"])))
    made = [adapter("vit", density, seed, target_modules=targets) for seed, (density, targets) in kinds]
    tasks = [task_from_tensors(f"t{i}", tensors, live) for i, (tensors, _) in enumerate(made)]
    with torch.no_grad():
        expected = [model(IMAGES) for _, model in made]
        for i in (0, 1, 0, 3, 2, 1, 2, 3):
            live.switch(tasks[i])
            torch.testing.assert_close(live.model(IMAGES), expected[i], rtol=1e-4, atol=1e-4)


def test_a_switch_that_fails_leaves_the_base(monkeypatch):
    base = build("vit")
    before, live = state_of(base), LiveModel(base, BankStats())
    tasks = [task_from_tensors(str(d), adapter("vit", d, 1)[0], live)
             for d in (0.995, 0.5)]  # fmt: skip
    live.switch(tasks[0])
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return write_masked(*args)

    monkeypatch.setattr("smn_peft.bank.live.write_masked", fail)
    switches = live.stats.switches
    with pytest.raises(torch.OutOfMemoryError):
        live.switch(tasks[1])
    assert live.current is None
    assert live.stats.switches > switches
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_head_of_other_classes_and_back():
    base = build("vit", num_classes=7)
    missing = base.load_state_dict({k: v for k, v in build("vit").state_dict().items() if "head" not in k}, False)
    assert {key.partition(".")[0] for key in missing.missing_keys} == {"head"}
    live = LiveModel(base, BankStats())
    tensors, model = adapter("vit", 0.99, 3)
    task = task_from_tensors("four", tensors, live)
    with torch.no_grad():
        own = base(IMAGES)
        live.switch(task)
        torch.testing.assert_close(base(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        live.switch(None)
        assert torch.equal(base(IMAGES), own)
    assert base.head.out_features == 7


def test_a_mask_is_held_as_what_it_removes_if_that_is_little():
    for numel, off in product([1, 13, 64, 70_001], [0.0, 0.001, 0.024, 0.026, 0.3, 1.0]):
        mask = torch.rand(numel) >= off
        held = TaskMask.from_packed("x", pack_bits(mask), numel, scaled=True)
        assert held.active == mask.sum()
        zeros = torch.nonzero(~mask)[:, 0]
        assert (held.removed is not None) == (len(zeros) <= SPARSE_BELOW * numel) == (held.packed is None)
        if held.removed is not None:
            assert held.removed.dtype == torch.int32
            assert held.removed.tolist() == zeros.tolist()
        always = TaskMask.from_packed("x", pack_bits(mask), numel, scaled=False, sparse_below=0)
        assert (always.active, always.scale, always.packed is None) == (held.active, 1.0, len(zeros) == 0)


def test_a_mask_that_removes_nothing_gives_the_base_where_weights_are_written_whole():
    layer = nn.Linear(5, 3)
    weight = layer.weight
    before, live = weight.detach().clone(), LiveTensor(layer, "weight")
    half, full = (pack_bits(torch.arange(15) >= first) for first in (7, 0))
    for bits in (half, full):
        live.apply(TaskMask.from_packed("x", bits, 15, scaled=True, sparse_below=0))
        assert torch.equal(weight, before) == (bits is full)


def test_compiled_graph_stays_valid():
    base = build("vit")
    live = LiveModel(base, BankStats())
    made = [adapter("vit", density, i) for i, density in enumerate((0.999, 0.7, 0.99))]
    tasks = [task_from_tensors(str(i), t, live) for i, (t, _) in enumerate(made)]
    live.switch(tasks[0])
    compiled = torch.compile(base, backend="eager", fullgraph=True)
    with torch.no_grad():
        for task, (_, model) in zip(tasks, made, strict=True):
            live.switch(task)
            torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"plain base model.*unload"):
        LiveModel(get_peft_model(build("vit"), MaskConfig()), BankStats())
    assert isinstance(LiveModel(copy.deepcopy(build("vit")), BankStats()), LiveModel)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2}),
        ("eva_giant_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 32, "num_heads": 2}),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "window_size": 4},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_use_a_weight_without_its_layer(architecture, options):
    def made():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=4, **options).eval().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)  # else the attention hardly counts
        return model

    base, generator = made(), torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *base.patch_embed.img_size, generator=generator).double()
    live = LiveModel(base, BankStats())
    for density in (0.98, 0.6):
        masked = get_peft_model(made(), MaskConfig(target_modules="all-linear")).eval()
        with torch.no_grad():
            for key, parameter in masked.named_parameters():
                if "smn_" in key:
                    parameter.copy_(density - torch.rand(parameter.shape, generator=generator))
            live.switch(task_from_tensors(str(density), get_peft_model_state_dict(masked), live))
            expected = masked.merge_and_unload()(images)
            torch.testing.assert_close(base(images), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_layers_that_are_called_keep_their_scale_outside(name):
    base = build(name)
    linears = {f"{key}.weight" for key, module in base.named_modules() if type(module) is nn.Linear}
    assert LiveModel(base, BankStats()).scalable == linears
