# SPDX-License-Identifier: Apache-2.0
"""What `adapt` trains: PEFT's methods by name, biases, the head; what is saved of it, in which dtype, and refusals."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from smn_peft import MaskConfig
from smn_peft.evaluation import extract_features
from smn_peft.training import TrainArguments, Trainer, run
from smn_peft.training.adapters import peft_config, peft_methods, trained_names
from smn_peft.training.assemble import build_images, build_task, build_train_loader, evaluation_of
from smn_peft.training.saved import evaluate_run, load_run

from .tiny import SWAV, tiny_arguments, write_model

# Options by method, and whether it takes convolutions.
METHODS = {
    "lora": ({"r": 2}, True),
    "ia3": ({}, True),
    "ln_tuning": ({}, True),
    "loha": ({"r": 2}, True),
    "boft": ({"boft_block_size": 4}, False),  # the stem's 147 inputs do not divide into blocks
    "vera": ({"r": 8, "save_projection": False}, False),
    "beft": ({}, False),
    "shira": ({"r": 1}, False),
    "supertuning": ({"sparsity": 0.9, "save_precomputed_indices": False}, False),
    "oft": ({"oft_block_size": 8}, False),
}


def arguments_of(folder, method, network, **more):
    model = write_model(folder, "build_vit" if network == "vit" else "build")
    options = {"peft": METHODS[method][0], "lr": 0.02, "epochs": 1, "backbone": model}
    return tiny_arguments(folder, adapt=method, **{**options, **more})


@pytest.mark.parametrize("network", ["vit", "resnet"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_peft_trains_and_comes_back(tmp_path, method, network):
    if network == "resnet" and not METHODS[method][1]:
        what = rf"adapt='{method}' cannot adapt \S+model\.py:build: .* Set options of the method by peft, other layers"
        with pytest.raises(ValueError, match=what):
            run(arguments_of(tmp_path, method, network))
        return
    arguments = arguments_of(tmp_path, method, network, head="probe", save_dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what is left out of the file and computed again
        summary = run(arguments)
        reports = evaluate_run(tmp_path / "out", backbone=arguments.backbone, metrics=["knn", "accuracy"])
        _, loaded = load_run(tmp_path / "out", backbone=arguments.backbone)
    assert {report.metric: report.value for report in reports} == summary.after
    path = tmp_path / "out" / "adapter_model.safetensors"
    assert summary.sizes["total"] == path.stat().st_size
    saved = load_file(path)
    kept = ("running_mean", "running_var")  # PEFT saves the norm that it trains as a whole
    assert not [name for name, tensor in saved.items() if tensor.dtype == torch.float32 and not name.endswith(kept)]
    _, base = load_run(tmp_path / "out", base=True, backbone=arguments.backbone)
    images = build_images(arguments).test
    moved, frozen = (extract_features(one.model, images, evaluation_of(one)).features for one in (loaded, base))
    assert not torch.equal(moved, frozen)
    state = base.model.state_dict()  # statistics are the base's
    for name, buffer in loaded.model.get_base_model().named_buffers():
        if "running" in name and "ln_tuning" not in name:
            assert torch.equal(buffer, state[name.replace("base_layer.", "").removeprefix("backbone.")])


def test_what_trains_is_the_adapter_and_the_head(tmp_path):
    for method in ("lora", "ln_tuning"):
        arguments = arguments_of(tmp_path, method, "resnet")
        task, _ = build_task(arguments, build_images(arguments))
        names = {adapted: [name for name, _, kind in task.trainable() if kind is adapted] for adapted in (True, False)}
        prefix = task.model.base_model.prefix
        assert names[True]
        assert all(prefix in name for name in names[True])
        assert [name.rpartition(".")[2] for name in names[False]] == ["weight", "bias"]
        task.train()
        norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert not any(norm.training for norm in norms)


def test_defaults_of_methods_follow_the_layers():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    lora = peft_config(model, "lora", MaskConfig(), {"r": 3})
    assert (lora.r, lora.lora_alpha) == (3, 6)
    assert peft_config(model, "lora", MaskConfig(), {"r": 3, "lora_alpha": 1}).lora_alpha == 1
    adapted = get_peft_model(model, peft_config(model, "ia3", MaskConfig(), {}))
    vectors = {name: len(p.flatten()) for name, p in adapted.named_parameters() if "ia3_l" in name}
    sizes = {name.split(".")[-3]: size for name, size in vectors.items()}
    assert sizes == {"qkv": 576, "proj": 192, "fc1": 768, "fc2": 768}  # the last scales its input
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    adapted = get_peft_model(model, peft_config(model, "ln_tuning", MaskConfig(), {}))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 5 * 2 * 192


@pytest.mark.parametrize("options", [{}, {**SWAV, "batch_size": 12}], ids=["supervised", "swav"])
def test_biases_train_alone(tmp_path, options):
    arguments = tiny_arguments(tmp_path, adapt="bias", lr=0.1, **options)
    summary = run(arguments)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    parts = {name.rpartition(".")[2] for name in saved if not name.startswith("head.")}
    assert parts == {"bias"}  # of BatchNorm: the convolutions have none
    assert any(name.startswith("head.") for name in saved) == (not options)
    assert 0 < summary.sizes["total"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert summary.sizes["total"] < summary.sizes["full"] / 2
    assert summary.after != summary.before


def test_files_hold_what_trained(tmp_path):
    sizes = {}
    for adapt in ("head", "statistics", "full"):
        out = tmp_path / adapt
        summary = run(tiny_arguments(tmp_path, adapt=adapt, lr=0.01, epochs=1, output_dir=str(out)))
        sizes[adapt] = summary.sizes
        names = set(load_file(out / "model.safetensors"))
        if adapt == "head":
            assert names == {f"head.{name}" for name in ("weight", "bias", "feature_mean", "feature_std")}
        if adapt == "statistics":
            assert all(name.startswith("head.") or "running" in name or "num_batches" in name for name in names)
    assert sizes["head"]["total"] < sizes["statistics"]["total"] < sizes["full"]["total"]
    assert sizes["full"]["total"] >= sizes["full"]["full"] == sizes["head"]["full"]


def test_a_file_that_lacks_a_bias_is_refused(tmp_path):
    arguments = tiny_arguments(tmp_path, adapt="bias", lr=0.1, epochs=1)
    run(arguments)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["backbone.bn1.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"does not fit .*: it lacks 1 tensors, such as backbone\.bn1\.bias"):
        load_run(tmp_path / "out", backbone=arguments.backbone)


def test_bfloat16_halves_the_file(tmp_path):
    totals = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        arguments = tiny_arguments(tmp_path, adapt="full", epochs=1, lr=0.01, save_dtype=dtype, output_dir=str(out))
        totals[dtype] = run(arguments).sizes["total"]
    assert totals["bfloat16"] < 0.7 * totals["float32"]  # headers are alike


def test_what_is_evaluated_last_is_rounded_as_it_is_saved(tmp_path):
    arguments = tiny_arguments(tmp_path, adapt="full", epochs=1, lr=0.01, save_dtype="bfloat16")
    images, exact = build_images(arguments), []
    task, backbone = build_task(arguments, images)

    def evaluate(task):
        tensors = [tensor for tensor in task.trained_tensors().values() if tensor.is_floating_point()]
        exact.append(all(torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)) for tensor in tensors))
        return {}

    Trainer(task, build_train_loader(arguments, images, backbone, 1, 0), arguments, evaluate=evaluate).train()
    assert exact == [False, True]


def test_names_of_what_trains():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model.requires_grad_(False)
    model[1].requires_grad_(True)
    assert trained_names(model) == ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    model[1].weight.requires_grad_(False)
    assert trained_names(model) == ["1.bias"]
    assert "2.running_var" in trained_names(model, statistics=True)
    model.requires_grad_(True)
    assert trained_names(model) == list(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "lor"}, r"adapt must be one of mask, full, .*; got 'lor'\. Did you mean lora\?"),
        ({"adapt": "lora", "peft": {"rank": 2}}, r"LoraConfig of adapt='lora' has no option 'rank'"),
        ({"adapt": "full", "peft": {"r": 2}}, r"adapt='full' has none: leave it out"),
        (
            {"adapt": "lora", "mask": {"batch_norm": "adapt"}},
            r"keeps the base's BatchNorm statistics: set mask",
        ),
        ({"adapt": "adalora"}, "adapt must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(backbone="a", dataset="b", **options)


def test_a_method_that_does_not_start_at_the_base_says_so(tmp_path):
    arguments = arguments_of(tmp_path, "lora", "vit", peft={"r": 2, "init_lora_weights": False})
    with pytest.warns(
        UserWarning, match=r"adapt='lora' changes the features by .* it does not start from .*build_vit"
    ):
        run(arguments)


def test_a_method_without_exclusions_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"VeraConfig has no exclude_modules, which mask\.exclude_modules sets"):
        run(arguments_of(tmp_path, "vera", "vit", mask={"exclude_modules": ["fc1"]}))


def test_methods_are_pefts():
    assert {"lora", "vera", "ia3", "ln_tuning", "beft", "shira", "supertuning", "oft", "boft"} <= set(peft_methods())
    assert not {"smn", "adalora", "prefix_tuning", "xlora"} & set(peft_methods())
