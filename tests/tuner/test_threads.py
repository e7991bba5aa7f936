# SPDX-License-Identifier: Apache-2.0
"""Many threads on one model, as in a server: every answer is that of one thread, and the base stays as it was."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm.layers
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.parallel import replicate

from smn_peft import MaskConfig

from .cases import BY_NAME, layer_of, masked_model
from .nets import TwoNorms

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def in_threads(run: Callable[[int], Tensor], times: int = 160) -> list[Tensor]:
    """What a call returns in each of eight threads, without gradients."""

    def call(index: int) -> Tensor:
        with torch.no_grad():
            return run(index)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(call, range(times)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :64].view(len(x), 4, 16)
        return self.body(x, x, x, need_weights=False)[0]


def convolution(kind: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 4, 3))


def hooked() -> nn.Module:
    net = convolution(nn.Conv2d)()
    for layer in (net[0], net[2]):
        layer.register_forward_hook(lambda module, args, output: output + module.weight.shape[0])
    return net


def overlaid() -> nn.Module:
    """As accelerate lays a forward of its own over a layer's."""
    net = convolution(nn.Conv2d)()
    for layer in (net[0], net[2]):
        layer._old_forward = layer.forward
        layer.forward = functools.partial(lambda module, x: module._old_forward(2 * x), layer)
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (Attention, {"target_modules": ["body"], "mask_bias": True}),
    "standardised": (convolution(timm.layers.StdConv2d), {"target_modules": ["0", "2"]}),
    "scaled standardised": (convolution(timm.layers.ScaledStdConv2d), {"target_modules": ["0", "2"]}),
    "as TensorFlow pads": (convolution(timm.layers.Conv2dSame), {"target_modules": ["0", "2"]}),
    "hooked": (hooked, {"target_modules": ["0", "2"]}),
    "overlaid": (overlaid, {"target_modules": ["0", "2"]}),
    "statistics": (TwoNorms, {"target_modules": ["enc.0"], "batch_norm": "adapt"}),
}


def build(name: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    make, own = NETS[name]
    base = make().eval()
    model = get_peft_model(base, MaskConfig(init_weights=False, **own, **options), adapter_name="one")
    if own.get("batch_norm") == "adapt":
        model.train()(X)
    return model.eval()


@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
@pytest.mark.parametrize("name", NETS)
def test_every_thread_gets_the_right_answer(name, packed):
    model = build(name, inference_mode=packed)
    base = {key: value.clone() for key, value in model.get_base_model().state_dict().items() if "base_layer" in key}
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        expected = copy.deepcopy(model)(X) if name != "overlaid" else model(X)
    assert all(torch.equal(out, expected) for out in in_threads(lambda _: model(X)))
    assert all(
        torch.equal(value, base[key]) for key, value in model.get_base_model().state_dict().items() if key in base
    )
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", ["attention", "standardised", "statistics"])
def test_mixed_batches_of_other_threads_are_not_seen(name):
    model = build(name)
    own = {**NETS[name][1], "seed": 5}
    model.add_adapter("two", MaskConfig(init_weights=False, **own))
    names = [["one", "two", "__base__", "two"], ["two", "__base__", "one", "one"], None]
    with torch.no_grad():
        expected = [model(X, adapter_names=each) if each else model(X) for each in names]
    assert not torch.allclose(expected[0], expected[1])
    outputs = in_threads(lambda i: model(X, adapter_names=names[i % 3]) if names[i % 3] else model(X))
    assert all(torch.equal(out, expected[index % 3]) for index, out in enumerate(outputs))


def test_loaded_masks_are_taken_over_before_any_thread_runs():
    case = BY_NAME["linear"]
    bits = get_peft_model_state_dict(masked_model(case, case.random(4, inference_mode=True)))
    for _ in range(10):
        model = inject_adapter_in_model(case.random(1), case.base()).eval()
        layer = layer_of(model)
        with torch.no_grad():  # as a loader that knows buffers only
            layer.smn_mask["default"].copy_(next(value for key, value in bits.items() if "smn_mask" in key))
        outputs = in_threads(lambda _, model=model: model(case.inputs()), 16)
        assert all(torch.equal(out, outputs[-1]) for out in outputs)
        with torch.no_grad():
            torch.testing.assert_close(outputs[0], masked_model(case, case.random(4))(case.inputs()))


@pytest.mark.parametrize("name", ["statistics", "standardised"])
def test_merged_masks_are_taken_out_before_any_thread_runs(name):
    for _ in range(10):
        model = build(name)
        with torch.no_grad(), model.disable_adapter():
            expected = model(X)
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
        assert all(torch.equal(out, expected) for out in in_threads(lambda _, model=model: model(X), 16))


# --- nn.DataParallel -------------------------------------------------------------------------------------------------


@pytest.fixture
def replicas(monkeypatch) -> Callable[[nn.Module], list[nn.Module]]:
    """Two replicas with tensors of their own, as two GPUs have them."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [
            [t * 1 if t.is_floating_point() else t.clone() for t in tensors] for _ in devices
        ],
    )
    return lambda model: replicate(model, ["cpu", "cpu"])


@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
@pytest.mark.parametrize("name", ["attention", "standardised", "hooked", "statistics"])
def test_a_replica_gives_the_answer_and_the_gradient(name, packed, replicas):
    model = build(name, inference_mode=packed)
    model.add_adapter("two", MaskConfig(init_weights=False, **{**NETS[name][1], "seed": 5}, inference_mode=packed))
    with torch.no_grad():  # "one" is not the newest
        expected = model(X)
        assert all(torch.equal(replica(X), expected) for replica in replicas(model))
        assert torch.equal(model(X), expected)
    if packed:
        return
    model(X).square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(replica(half).square().sum() for replica, half in zip(replicas(model), X.split(2), strict=True)).backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5)


def test_a_replica_is_refused_what_the_model_has_to_do_first(replicas):
    case = BY_NAME["linear"]
    native = inject_adapter_in_model(case.random(1), case.base()).eval()
    layer_of(native).smn_mask["default"].bitwise_not_()
    with pytest.raises(RuntimeError, match=r"call the model once before it is in nn\.DataParallel"):
        replicas(native)
    replicas(native)
    model = masked_model(case, case.random(1))
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) before nn\.DataParallel runs"):
        replicas(model)
