# SPDX-License-Identifier: Apache-2.0
"""The contract: every feature of the tuner on every layer type of the table."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from smn_peft.functional.masking import compute_mask, masked_weight, straight_through
from smn_peft.storage.adapter_file import WEIGHTS_NAME, read_adapter_file

from .cases import BY_NAME, CASES, REPRESENTATIVES, Case, layer_of, mask_bits, masked_model, reference, train

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
representatives = pytest.mark.parametrize("case", REPRESENTATIVES, ids=lambda case: case.name)
# What only scores of single weights can do.
of_weights = pytest.mark.parametrize(
    "case", [case for case in REPRESENTATIVES if "granularity" not in case.options], ids=lambda case: case.name
)
# Bases without an id are expected here; what matters warns in a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:Unable to fetch remote file")


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers but the adapters'."""
    return {
        name.replace("base_layer.", "").removeprefix("base_model.model."): tensor.detach().clone()
        for name, tensor in net.state_dict().items()
        if "smn_" not in name
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Same names, same bytes."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def reload(case: Case, folder: Path, **options) -> PeftModel:
    return PeftModel.from_pretrained(case.base(), folder, **options).eval()


@every_case
def test_a_full_mask_is_the_base_bit_for_bit(case):
    x = case.inputs()
    for train_mode in (False, True):
        expected = case.base().train(train_mode)(x)
        model = masked_model(case).train(train_mode)
        # torch's matmul takes another path for a weight that requires a gradient: so may the effective weight
        trained = case.base(frozen=False).train(train_mode)(x)
        assert any(torch.equal(model(x), base) for base in (expected, trained))
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert all(mask.all() for mask in mask_bits(model).values())


@every_case
def test_forward_is_the_masked_and_scaled_base(case):
    x, model = case.inputs(), masked_model(case, case.random())
    masks = mask_bits(model)
    assert all(0 < int(mask.sum()) < mask.numel() for mask in masks.values())
    expected = reference(case, masks, model.peft_config["default"].scale)(x)
    assert not torch.allclose(expected, case.base()(x), **case.tolerance)
    differentiable = model(x)
    assert differentiable.requires_grad
    torch.testing.assert_close(differentiable, expected, **case.tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **case.tolerance)
        torch.testing.assert_close(model(x), expected, **case.tolerance)  # from the cache


@every_case
def test_the_gradient_is_autograd_s_over_the_written_out_formula(case):
    model = masked_model(case, case.random())
    layer, x = layer_of(model), case.inputs()
    weights = torch.arange(1.0, 4.0)  # not a loss under which sums cancel
    (model(x).float().tanh() * weights).sum().backward()
    base, tensors, spec = case.base(), {}, model.peft_config["default"].mask_spec()
    leaves = {name: own.detach().clone().requires_grad_() for name, own in layer.parameters_of("default").items()}
    for slot in layer.smn_info["default"].slots:
        parameter, mask = base.body.get_parameter(slot.path), torch.ones((), dtype=case.dtype)
        for name in layer.scores_of("default", slot):
            own = straight_through(leaves[name], spec, parameter.dtype)
            mask = mask * (own.reshape(parameter.shape) if slot.is_bias else own)
        tensors[f"body.{slot.path}"] = masked_weight(parameter.detach(), mask, spec)
    (torch.func.functional_call(base, tensors, (x,)).float().tanh() * weights).sum().backward()
    size = 1e-9 if case.dtype == torch.float64 else (1e-4 if case.dtype == torch.float32 else 6e-2)
    for name, actual in ((name, own.grad) for name, own in layer.parameters_of("default").items()):
        expected = leaves[name].grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=size, atol=size * float(expected.abs().max()))


@representatives
def test_training_changes_the_scores_and_nothing_else(case):
    base, model = case.base(), masked_model(case)
    layer = layer_of(model)
    before = [own.detach().clone() for own in layer.parameters_of("default").values()]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("smn_" in name and "scores" in name for name in names)
    assert len(names) == len(before)
    train(model, case.inputs())
    assert_same(weights_of(model), weights_of(base))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in names)
    after = layer.parameters_of("default").values()
    assert not any(torch.equal(scores, old) for scores, old in zip(after, before, strict=True))
    assert any(not mask.all() for mask in mask_bits(model).values())


@representatives
def test_save_and_load_give_identical_logits_and_a_second_save_identical_bytes(case, tmp_path):
    x, model = case.inputs(), masked_model(case)
    train(model, x)
    masks = mask_bits(model)
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path / "first")
    loaded = reload(case, tmp_path / "first")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)
    assert_same(mask_bits(loaded), masks)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / WEIGHTS_NAME for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    sizes = {key.rpartition(".")[2]: tensor.numel() for key, tensor in read_adapter_file(first).items()}
    assert sorted(sizes.values()) == sorted((mask.numel() + 7) // 8 for mask in masks.values())


@representatives
def test_a_loaded_adapter_trains_on_from_its_mask(case, tmp_path):
    x, model = case.inputs(), masked_model(case)
    train(model, x)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(x)
    with pytest.warns(UserWarning, match="saved as bits: training goes on from its mask"):
        loaded = reload(case, tmp_path, is_trainable=True)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)
    layer, config = layer_of(loaded), loaded.peft_config["default"]
    for scores in layer.parameters_of("default").values():
        assert scores.requires_grad
        distance = (scores - config.threshold).abs()
        torch.testing.assert_close(distance, torch.full_like(scores, abs(config.init_score - config.threshold)))
    train(loaded, case.inputs(1))
    assert any(not torch.equal(mask, mask_bits(model)[path]) for path, mask in mask_bits(loaded).items())


@representatives
def test_saved_scores_resume_exactly(case, tmp_path):
    x, model = case.inputs(), masked_model(case, case.config(save_scores=True))
    train(model, x)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*saved as bits")
        loaded = reload(case, tmp_path, is_trainable=True)
    own, others = (layer_of(each).parameters_of("default") for each in (loaded, model))
    assert own.keys() == others.keys()
    assert all(map(torch.equal, own.values(), others.values()))
    train(model, x)
    train(loaded, x)
    assert_same(mask_bits(loaded), mask_bits(model))
    inference = reload(case, tmp_path)
    assert not any("scores" in name for name, _ in inference.named_parameters())


@representatives
@pytest.mark.filterwarnings("ignore:.*saved as bits")
def test_low_cpu_mem_usage_loads_the_same(case, tmp_path):
    x, model = case.inputs(), masked_model(case, case.random())
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        options = {"low_cpu_mem_usage": True, "is_trainable": is_trainable}
        loaded = reload(case, tmp_path, **options)
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert not any(tensor.is_meta for tensor in tensors)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
        loaded.load_adapter(tmp_path, "other", **options)
        loaded.set_adapter("other")
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


@representatives
def test_merging_changes_no_output_and_unmerging_restores_every_bit(case):
    base, x, model = case.base(), case.inputs(), masked_model(case, case.random())
    with torch.no_grad():
        expected = model(x)
        for safe_merge in (False, True):
            model.merge_adapter(safe_merge=safe_merge)
            assert torch.equal(model(x), expected)
            merged = weights_of(model)
            assert any(not torch.equal(merged[name], tensor) for name, tensor in weights_of(base).items())
            model.unmerge_adapter()
            assert_same(weights_of(model), weights_of(base))
            assert torch.equal(model(x), expected)


@representatives
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_merging_one_after_the_other_merges_the_intersection(case):
    base, x, model = case.base(), case.inputs(), masked_model(case, case.random(1), "first")
    model.add_adapter("second", case.random(2))
    with torch.no_grad():
        first = model(x)
        model.base_model.set_adapter(["first", "second"])
        both = model(x)
        assert not torch.equal(both, first)
        model.merge_adapter(["first"])
        assert torch.equal(model(x), first)
        model.merge_adapter(["second"])
        assert torch.equal(model(x), both)
        model.unmerge_adapter()
        assert_same(weights_of(model), weights_of(base))
        model.merge_adapter()
        assert torch.equal(model(x), both)
        model.unmerge_adapter()
        assert torch.equal(model.merge_and_unload()(x), both)


@representatives
def test_merge_and_unload_and_unload(case):
    x, model = case.inputs(), masked_model(case, case.random())
    with torch.no_grad():
        expected = model(x)
        merged = copy.deepcopy(model).merge_and_unload()
        assert type(merged.body) is type(case.base().body)
        assert torch.equal(merged(x), expected)
        bare = model.unload()
        assert_same(weights_of(bare), weights_of(case.base()))
        assert bare.state_dict().keys() == case.base().state_dict().keys()
        assert torch.equal(bare(x), case.base()(x))


@representatives
def test_a_disabled_adapter_leaves_the_base(case):
    x, model = case.inputs(), masked_model(case, case.random())
    with torch.no_grad():
        expected, base = model(x), case.base()(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base)
    assert not torch.equal(expected, base)


@representatives
@pytest.mark.parametrize("packed", [False, True])
def test_several_adapters_switch_combine_and_go(case, packed):
    x, options = case.inputs(), {"inference_mode": packed}
    model = masked_model(case, case.random(1, **options), "first")
    model.add_adapter("second", case.random(2, **options))
    scale = model.peft_config["first"].scale
    masks = {name: mask_bits(model, name) for name in ("first", "second")}
    both = {path: mask & masks["second"][path] for path, mask in masks["first"].items()}
    with torch.no_grad():
        for name in ("first", "second", "first"):
            model.set_adapter(name)
            torch.testing.assert_close(model(x), reference(case, masks[name], scale)(x), **case.tolerance)
        model.base_model.set_adapter(["first", "second"])
        torch.testing.assert_close(model(x), reference(case, both, scale)(x), **case.tolerance)
    if not packed:
        torch.testing.assert_close(model(x), reference(case, both, scale)(x), **case.tolerance)  # differentiable
    model.set_adapter("first")
    model.delete_adapter("second")
    layer = layer_of(model)
    assert list(model.peft_config) == ["first"]
    assert list(layer.smn_info) == ["first"]
    assert not any("second" in name for name in model.state_dict())
    for slot in layer.present_slots:
        assert "second" not in [*layer.bits(slot).keys(), *layer.bits(slot).older, *layer.parameters_of("second")]
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(case, masks["first"], scale)(x), **case.tolerance)


@every_case
def test_a_mixed_batch_gives_each_sample_its_adapter(case):
    x, model = case.inputs(), masked_model(case, case.random(1), "first")
    model.add_adapter("second", case.random(2, inference_mode=True))
    names = ["second", "__base__", "first", "second"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for index, name in enumerate(names):
            if name == "__base__":
                expected = case.base()(x)
            else:
                model.set_adapter(name)
                expected = model(x)
            torch.testing.assert_close(mixed[index], expected[index], **case.tolerance)
    model.set_adapter("first")
    with torch.no_grad():
        assert not torch.equal(model(x), mixed)  # the names hold for one call


@representatives
def test_a_deep_copy_is_independent(case):
    x, model = case.inputs(), masked_model(case, case.random())
    with torch.no_grad():
        expected = model(x)
    twin = copy.deepcopy(model)
    train(twin, x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)


@every_case
def test_autocast_runs_forward_and_backward(case):
    x, model = case.inputs(), masked_model(case, case.random())
    if case.dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")
    scale = model.peft_config["default"].scale
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        expected = reference(case, mask_bits(model), scale)(x)
        out.float().square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.any()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("conv2d", False), ("transposed2d", False), pytest.param("conv2d", True, marks=pytest.mark.slow)],
)
def test_two_adapters_train_under_autocast(name, compiled):
    case = BY_NAME[name]
    x, model = case.inputs(), masked_model(case, case.random(1))
    model.add_adapter("second", case.random(2))
    model.base_model.set_adapter(["default", "second"])
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    gradients = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            forward(x).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for wide, narrow in zip(*gradients, strict=True):
        assert narrow.dtype == torch.float32
        assert (narrow - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_convolution_follows_autocast(adapters, trains):
    case = BY_NAME["conv2d"]
    model = masked_model(case, case.random(1))
    model.add_adapter("second", case.random(2))
    model.base_model.set_adapter(["default", "second"][:adapters])
    layer = layer_of(model)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trains):
        assert layer(torch.randn(2, 3, 7, 6)).dtype == torch.bfloat16


@representatives
def test_state_dicts_round_trip_strictly(case):
    x, first, second = case.inputs(), masked_model(case, case.random(1)), masked_model(case, case.random(2))
    with torch.no_grad():
        second(x)
        assert not torch.equal(first(x), second(x))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))
    packed, other = (masked_model(case, case.random(seed, inference_mode=True)) for seed in (1, 2))
    with torch.no_grad():
        other(x)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(packed(x), first(x))
        assert torch.equal(packed(x), other(x))
    trainable = masked_model(case, case.random(3))  # bits that a loader writes in place become scores
    missing, unexpected = trainable.load_state_dict(packed.state_dict(), strict=False)
    assert all("scores" in name for name in missing)
    assert not unexpected
    assert_same(mask_bits(trainable), mask_bits(packed))
    assert all(parameter.requires_grad == ("scores" in name) for name, parameter in trainable.named_parameters())


@of_weights
@pytest.mark.parametrize("rank_by", ["score", "absolute"])
def test_topk_keeps_exactly_its_density(case, rank_by):
    options = {"mask_type": "topk", "density": 0.3, "init_score": "kaiming_uniform", "rank_by": rank_by}
    options |= {"threshold": 0.0}
    x, model = case.inputs(), masked_model(case, case.config(**options))
    train(model, x, lr=0.1)
    masks = mask_bits(model)
    assert all(int(mask.sum()) == round(0.3 * mask.numel()) for mask in masks.values())
    expected = reference(case, masks, model.peft_config["default"].scale)(x)
    torch.testing.assert_close(model(x), expected, **case.tolerance)


@of_weights
@pytest.mark.parametrize("select", ["random", "magnitude"])
def test_what_is_not_trainable_stays_on(case, select, tmp_path):
    x, model = case.inputs(), masked_model(case, case.config(trainable_fraction=0.5, select=select, seed=3))
    layer = layer_of(model)
    train(model, x)
    masks, removed = mask_bits(model), 0
    for slot in layer.smn_info["default"].slots:
        chosen = layer.trainable("default", slot)
        assert int(chosen.sum()) == round(0.5 * chosen.numel())
        assert masks[slot.path][~chosen].all()
        scores = layer.scores(slot)["default"]
        assert torch.equal(scores[~chosen], torch.full_like(scores[~chosen], model.peft_config["default"].init_score))
        removed += int((~masks[slot.path]).sum())
        if select == "magnitude":
            magnitude = case.base().body.get_parameter(slot.path).abs()
            assert magnitude[chosen].min() >= magnitude[~chosen].max()
    assert removed > 0
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reload(case, tmp_path)(x), expected)


@representatives
def test_combined_adapters(case, tmp_path):
    x, model = case.inputs(), masked_model(case, case.random(1), "one")
    model.add_adapter("two", case.random(2))
    model.add_adapter("three", case.random(3))
    names = ["one", "two", "three"]
    masks = [mask_bits(model, name) for name in names]
    for name, kind, weights, wanted in (
        ("union", "union", None, lambda votes, first: votes > 0),
        ("intersection", "intersection", None, lambda votes, first: votes == 3),
        ("majority", "majority", None, lambda votes, first: votes > 1),
        ("weighted", "majority", [5.0, 2.0, 2.0], lambda votes, first: first),
    ):
        model.base_model.add_weighted_adapter(names, weights, name, kind)
        for path, mask in mask_bits(model, name).items():
            votes = torch.stack([bits[path] for bits in masks]).sum(0)
            assert torch.equal(mask, wanted(votes, masks[0][path]))
        model.set_adapter(name)
        expected = reference(case, mask_bits(model, name), model.peft_config["one"].scale)(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, **case.tolerance)
    with torch.no_grad():
        model.save_pretrained(tmp_path, selected_adapters=["weighted"])
        assert torch.equal(reload(case, tmp_path / "weighted")(x), model(x))


@representatives
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(case, use_reentrant):
    x, plain, saving = case.inputs(), masked_model(case, case.random()), masked_model(case, case.random())
    plain(x).float().square().sum().backward()
    anchor = torch.zeros((), requires_grad=True)  # reentrant checkpoints need an input that requires a gradient
    out = checkpoint(lambda _: saving(x), anchor, use_reentrant=use_reentrant)
    out.float().square().sum().backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (plain, saving)]
    for first, second in zip(*gradients, strict=True):
        # Reentrant: the forward ran without gradients, where the scaled weight is rounded to the base's dtype.
        size = 5e-2 if case.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(first, second, rtol=size, atol=size * float(first.abs().max()))


@representatives
def test_scores_follow_a_cast_of_the_model_but_stay_wide(case):
    x, model = case.inputs(), masked_model(case, case.random())
    masks = mask_bits(model)
    model.to(torch.bfloat16)
    assert_same(mask_bits(model), masks)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.bfloat16 if not parameter.requires_grad else parameter.dtype)
        assert not parameter.requires_grad or parameter.dtype in (torch.float32, torch.float64)
    with torch.no_grad():
        out = model(x if case.vocabulary else x.to(torch.bfloat16))
        expected = reference(case, masks, model.peft_config["default"].scale)(x)
    torch.testing.assert_close(out.float(), expected.float(), rtol=8e-2, atol=8e-2)


@representatives
@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
def test_inference_mode_leaves_nothing_behind(case, packed):
    some = {} if "granularity" in case.options else {"trainable_fraction": 0.9}
    x, model = case.inputs(), masked_model(case, case.random(inference_mode=packed, **some))
    with torch.inference_mode():
        assert 0 < model.base_model.density() < 1
        first = model(x)
        assert torch.equal(model(x), first)
    with torch.no_grad():
        assert torch.equal(model(x), first)
    if packed:  # what was kept in inference mode serves a backward through a frozen layer
        model.base_model.model.classify.requires_grad_()
        x = x if case.vocabulary else x.requires_grad_()
    model(x).float().square().sum().backward()
    assert packed or all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not packed or case.vocabulary or x.grad.any()


@representatives
def test_a_cast_while_merged_comes_back_up_to_rounding(case):
    model, base = masked_model(case, case.random()), case.base()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    for name, tensor in weights_of(model).items():
        torch.testing.assert_close(tensor.float(), weights_of(base)[name].float(), rtol=2e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear", "linear-bias", "conv2d", "conv2d-same", "transposed2d", "conv1d-transformers", "embedding"]
)
@pytest.mark.parametrize("state", ["trainable", "packed", "merged"])
def test_a_compiled_model_gives_the_same(name, state):
    case = BY_NAME[name]
    x, model = case.inputs(), masked_model(case, case.random(inference_mode=state == "packed"))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)  # the one to compile has not run yet
        if state == "merged":
            model.merge_adapter()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, **case.tolerance)
    if state != "trainable":
        return
    plain = copy.deepcopy(model)
    compiled(x).float().square().sum().backward()
    plain(x).float().square().sum().backward()
    for first, second in zip(model.parameters(), plain.parameters(), strict=True):
        if second.requires_grad:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-5)


def test_a_graph_has_what_load_state_dict_wrote_before_it():
    case = BY_NAME["linear"]
    source, target = masked_model(case, case.random()), masked_model(case)
    state = {f"{key}.default": bits for key, bits in get_peft_model_state_dict(source).items()}
    target.load_state_dict(state, strict=False)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(target, backend="aot_eager")(case.inputs())
        assert not torch.equal(compiled, masked_model(case)(case.inputs()))
        torch.testing.assert_close(compiled, source(case.inputs()), **case.tolerance)


def test_the_table_covers_what_the_tuner_can_mask():
    from smn_peft.tuner.forms import MASKABLE, mask_layer_for

    assert {mask_layer_for(case.build()) for case in CASES} == set(MASKABLE.values())
    assert len({type(case.build()) for case in CASES}) >= 12
    assert {mask_layer_for(case.build()) for case in REPRESENTATIVES} == set(MASKABLE.values())


def test_masks_are_those_of_the_scores():
    case = BY_NAME["conv2d"]
    model = masked_model(case, case.random())
    scores = layer_of(model).scores(layer_of(model).present_slots[0])["default"]
    assert torch.equal(mask_bits(model)["weight"], compute_mask(scores, model.peft_config["default"].mask_spec()))
    assert get_peft_model(case.base(), case.random()).base_model.density() == pytest.approx(model.base_model.density())
