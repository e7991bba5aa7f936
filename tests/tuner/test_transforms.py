# SPDX-License-Identifier: Apache-2.0
"""What others do with a model: torch.func, tracing, export, averages of weights, DDP, hooks, old configs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel

from smn_peft import MaskConfig

from .nets import TwoNorms

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:.*saved as bits")


def masked(**options) -> PeftModel:
    config = MaskConfig(target_modules=["enc.0", "head.0"], init_weights=False, **options)
    return get_peft_model(TwoNorms().eval(), config).eval()


def scores_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "smn_scores" in name}


@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
def test_transforms_of_the_input(packed):
    model = masked(inference_mode=packed)
    plain = copy.deepcopy(model).merge_and_unload().eval()
    for net in (model, plain):
        net(X)
    torch.testing.assert_close(vmap(model)(X[:, None]), vmap(plain)(X[:, None]))
    torch.testing.assert_close(jacrev(model)(X[:1]), jacrev(plain)(X[:1]))
    torch.testing.assert_close(jvp(model, (X,), (X,)), jvp(plain, (X,), (X,)))


def test_gradients_per_sample():
    model = masked()

    def loss(scores, x):
        return functional_call(model, scores, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(scores_of(model), X)
    for index, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, parameter in scores_of(model).items():
            torch.testing.assert_close(each[name][index], parameter.grad)


@pytest.mark.parametrize("no_grad", [False, True])
def test_a_trace_is_the_model(no_grad):
    model = masked()
    with torch.set_grad_enabled(not no_grad):
        traced = torch.jit.trace(model, X)
        torch.testing.assert_close(traced(X[:3]), model(X[:3]))


@pytest.mark.parametrize("native", [False, True])
def test_an_exported_model_goes_on(native):
    model = masked()
    if native:
        model = inject_adapter_in_model(MaskConfig(target_modules=["enc.0"], init_weights=False), TwoNorms().eval())
        with pytest.raises(RuntimeError, match="call the model once before its export"):  # a loader may have written
            torch.export.export(model, (X,))
        model(X)
    with torch.no_grad():
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), model(X))


def test_what_was_loaded_is_not_left_out_of_an_export():
    model, fresh = (get_peft_model(TwoNorms().eval(), MaskConfig(target_modules=["enc.0"])) for _ in range(2))
    model.load_state_dict(masked(inference_mode=True).state_dict(), strict=False)
    with torch.no_grad():
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), model(X))
        assert not torch.allclose(exported(X), fresh(X))


@pytest.mark.parametrize("average", [ModelEmaV3, lambda model: AveragedModel(model, use_buffers=True)])
def test_weights_are_averaged(average):
    model = masked()
    averaged = average(model)
    model(X)
    update = getattr(averaged, "update_parameters", None) or averaged.update
    update(model)
    assert torch.equal(averaged.module(X), model(X))


@pytest.mark.parametrize("native", [False, True])
def test_ddp_s_broadcast_leaves_scores_alone(native, tmp_path):
    config = MaskConfig(target_modules=["enc.0"], mask_type="topk", density=0.5, init_score="kaiming_uniform")
    model = inject_adapter_in_model(config, TwoNorms()) if native else get_peft_model(TwoNorms(), config)
    before = {name: scores.detach().clone() for name, scores in scores_of(model).items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)(X)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(scores, before[name]) for name, scores in scores_of(model).items())


def double(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (2 * args[0],)


@pytest.mark.parametrize("path", ["enc.0", "head.0"])
@pytest.mark.parametrize("over", ["hook", "forward"])
def test_what_stands_before_a_layer_stays_there(path, over):
    def changed(model: nn.Module) -> nn.Module:
        layer = model.get_submodule(path)
        if over == "hook":
            layer.register_forward_pre_hook(double)
        else:
            own = layer.forward
            layer.forward = lambda x: own(2 * x)
        return model

    full = get_peft_model(changed(TwoNorms()).eval(), MaskConfig(target_modules=[path])).eval()
    assert torch.equal(full(X), changed(TwoNorms()).eval()(X))


def test_a_hook_that_comes_late_is_called():
    model = masked()
    with torch.no_grad():
        before = model(X)
        model(X)
        handle = model.base_model.model.head[0].base_layer.register_forward_pre_hook(double)
        assert not torch.allclose(model(X), before)
        handle.remove()
        assert torch.equal(model(X), before)
    model(X).sum().backward()
    model.base_model.model.head[0].base_layer.register_forward_pre_hook(double)
    model.zero_grad()
    model(X).sum().backward()
    assert model.base_model.model.head[0].smn_scores["default"].grad.any()


def test_a_config_that_was_saved_serves_another_base(tmp_path):
    config = MaskConfig(target_modules=["enc.0"])
    get_peft_model(TwoNorms(), config).save_pretrained(tmp_path)
    other = TwoNorms()
    other.enc[0].weight.data.mul_(2)
    get_peft_model(other, config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not belong to this base"):
        PeftModel.from_pretrained(TwoNorms(), tmp_path / "other")


def test_a_pickle_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*without safe_serialization=False"):
        masked().save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize(
    "options", [{"rank_by": "absolute"}, {"init_score": 0.0}, {"density_schedule": "linear"}, {"save_scores": True,
    "density_schedule": "linear"}], ids=str)  # fmt: skip
def test_a_topk_adapter_goes_on_with_its_mask(options, tmp_path):
    config = MaskConfig(target_modules=["enc.0", "head.0"], mask_type="topk", density=0.5, **options)
    model = get_peft_model(TwoNorms(), config)
    for scores in scores_of(model).values():
        nn.init.normal_(scores)
    if config.density_schedule:
        model.base_model.update_density(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoNorms(), tmp_path, is_trainable=True)
    masks = model.base_model.masks()
    assert loaded.base_model.density() == model.base_model.density() == (0.75 if config.density_schedule else 0.5)
    assert all(torch.equal(mask, masks[name]) for name, mask in loaded.base_model.masks().items())
