# SPDX-License-Identifier: Apache-2.0
"""What a run saved gives the same features and logits again, and evaluates as it did at the end of training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from smn_peft.backbones import pooled_features
from smn_peft.evaluation import EvalReport, report_table
from smn_peft.storage import adapter_file
from smn_peft.training import Trainer, run
from smn_peft.training.run import RunSummary
from smn_peft.training.saved import evaluate_run, load_run

from .tiny import SWAV, TRAIN, base_of, tiny_arguments, write_clip, write_model, write_npz

MASK = {"mask": {"batch_norm": "adapt"}}
KINDS = {
    "trained": MASK,
    "probe": {"head": "probe"},
    "masked": {"head": "masked", **MASK},
    "swav": {**SWAV, **MASK},
    "full": {"adapt": "full", "lr": 0.05},
    "head": {"adapt": "head"},
    "bias": {"adapt": "bias", "lr": 0.05},
    "lora": {"adapt": "lora", "peft": {"r": 2}, "lr": 0.05},
    "mask in bfloat16": {**MASK, "head": "probe", "save_dtype": "bfloat16"},
    "mask in int8": {**MASK, "save_dtype": "int8"},
    "probe in int8": {**MASK, "head": "probe", "save_dtype": "int8"},
    "base in bfloat16": {"base_dtype": "bfloat16", **MASK},
    "lora on bfloat16": {"base_dtype": "bfloat16", "adapt": "lora", "peft": {"r": 2}, "lr": 0.05},
    "full in bfloat16": {"adapt": "full", "lr": 0.05, "head": "probe", "save_dtype": "bfloat16"},
    "lora in bfloat16": {"adapt": "lora", "peft": {"r": 2}, "lr": 0.05, "head": "probe", "save_dtype": "bfloat16"},
    "bias in bfloat16": {"adapt": "bias", "lr": 0.05, "head": "probe", "save_dtype": "bfloat16"},
    "zero_shot": {"objective": "zero_shot", "templates": ["a photo of a {}."]},
}


def run_and_keep(monkeypatch, arguments):
    """The summary of a run, and its task as it was at the end."""
    kept = []

    class Kept(Trainer):
        def __init__(self, task, *args, **kwargs):
            kept.append(task)
            super().__init__(task, *args, **kwargs)

    monkeypatch.setattr(sys.modules[run.__module__], "Trainer", Kept)
    summary = run(arguments)
    return summary, kept[0].eval()


def of_vit(folder, kind):
    """The ViT where the base is bfloat16: of a convolution of stride 2 over one pixel torch's gradient can be NaN."""
    return {"backbone": write_model(folder, "build_vit")} if "base_dtype" in KINDS[kind] else {}


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_to_the_bit(tmp_path, monkeypatch, kind):
    extra = {"backbone": write_clip(tmp_path / "clip"), "lr": 1.0} if kind == "zero_shot" else of_vit(tmp_path, kind)
    arguments = tiny_arguments(tmp_path, epochs=1, eval_probe=kind in ("probe", "full"), **KINDS[kind], **extra)
    summary, task = run_and_keep(monkeypatch, arguments)
    torch.rand(3)  # another random state than the run's
    base = arguments.backbone
    loaded_arguments, backbone = load_run(tmp_path / "out", backbone=base)
    assert loaded_arguments == arguments
    pixel_values = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(backbone.features(pixel_values), pooled_features(task.model, pixel_values))
        if kind not in ("swav", "zero_shot"):
            assert torch.equal(backbone.model(pixel_values), task.logits_of(pooled_features(task.model, pixel_values)))
    reports = evaluate_run(tmp_path / "out", backbone=base, metrics=list(summary.after))
    assert {report.metric: report.value for report in reports} == summary.after
    frozen = evaluate_run(tmp_path / "out", base=True, backbone=base, metrics=list(summary.after))
    kept = {report.metric: report.value for report in frozen}
    assert kept == {name: value for name, value in summary.before.items() if name in kept}
    assert ("accuracy" in kept) == (kind == "zero_shot")


@pytest.mark.parametrize("kind", ["trained", "swav", "base in bfloat16"])
def test_without_run_json_the_adapter_names_its_base(tmp_path, kind):
    # Weights of a file, which adapter_config.json can name; a run's own random ones it cannot.
    model = (tmp_path / "model.py").resolve()
    arguments = tiny_arguments(tmp_path, epochs=1, **KINDS[kind], **of_vit(tmp_path, kind))
    text = model.read_text().replace("    # Unseeded", "    import torch\n    torch.manual_seed(0)\n    #")
    model.write_text(text.replace("build_vit():\n", "build_vit():\n    import torch\n    torch.manual_seed(0)\n"))
    run(arguments)
    named = {"backbone": arguments.backbone}
    _, expected = load_run(tmp_path / "out", **named)
    expected_reports = evaluate_run(tmp_path / "out", **named, metrics=["knn"])
    (tmp_path / "out" / "run.json").unlink()
    found_arguments, backbone = load_run(tmp_path / "out", **named)
    assert found_arguments is None
    pixel_values = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(backbone.model(pixel_values), expected.model(pixel_values))
    with pytest.raises(ValueError, match=r"out has no run\.json that says what it was trained on: name a dataset"):
        evaluate_run(tmp_path / "out", **named)
    reports = evaluate_run(tmp_path / "out", **named, dataset=arguments.dataset)
    assert [report.metric for report in reports] == ["knn"]
    assert reports[0].settings["test_images"] == expected_reports[0].settings["test_images"]
    with pytest.raises(ValueError, match="holds no classifier, so there is no accuracy: take knn or linear_probe"):
        evaluate_run(tmp_path / "out", **named, dataset=arguments.dataset, metrics=["accuracy"])


def test_a_base_that_cannot_be_known(tmp_path):
    arguments = tiny_arguments(tmp_path, head="masked", epochs=1, eval_split=None)
    run(arguments)
    out = tmp_path / "out"
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds no head of its classifier, and no run\.json says how it was made"):
        load_run(out, backbone=arguments.backbone)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"names no base: name it, as in --backbone timm/"):
        load_run(out)
    _, base = load_run(out, base=True, backbone=arguments.backbone)
    assert base.feature_dim == 16
    (out / adapter_file.WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="the copy of the adapter is incomplete"):
        load_run(out, backbone=arguments.backbone)
    (out / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"only checkpoint-4 of a run that is not finished: .*--resume"):
        load_run(out)
    with pytest.raises(
        FileNotFoundError, match=r"holds no run\.json and no adapter_config\.json: name the output_dir"
    ):
        load_run(tmp_path / "nowhere")


def test_another_base_is_refused(tmp_path):
    run(tiny_arguments(tmp_path, max_steps=1, eval_split=None))
    model = tmp_path / "model.py"
    model.write_text(model.read_text().replace("    return", "    model.conv1.weight.data += 1\n    return"))
    with pytest.raises(ValueError, match="The adapter does not belong to this base model"):
        load_run(tmp_path / "out", backbone=base_of(tmp_path))


def test_weights_of_another_model(tmp_path):
    run(tiny_arguments(tmp_path, adapt="full", lr=0.01, max_steps=1, eval_split=None))
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("head.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model that (?s:.*)head\.bias"):
        load_run(tmp_path / "out", backbone=base_of(tmp_path))
    path.write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_run(tmp_path / "out", backbone=base_of(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_run(tmp_path / "out", backbone=base_of(tmp_path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_arguments(folder, **MASK, fraction=0.5))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "out"


def test_metrics_low_shot_and_limits(finished):
    reports = evaluate_run(
        finished, backbone=base_of(finished.parent), metrics=["linear_probe", "knn"], low_shot=[0.5, 0.06], seeds=2
    )
    assert [report.metric for report in reports] == ["linear_probe", "knn", "linear_probe@0.5", "linear_probe@0.06"]
    assert [len(report.values) for report in reports] == [1, 1, 2, 2]
    assert [report.settings.get("labelled_images") for report in reports[2:]] == [24, 3]
    # k-NN votes with all labels, though training saw half of the images.
    assert reports[1].settings["training_images"] == TRAIN
    assert EvalReport.from_json(reports[2].to_json()) == reports[2]
    assert report_table(reports).count("\n") == 2
    (limited,) = evaluate_run(finished, backbone=base_of(finished.parent), metrics=["knn"], limit=12)
    assert (limited.settings["training_images"], limited.settings["test_images"]) == (12, 12)
    (only,) = evaluate_run(finished, backbone=base_of(finished.parent), low_shot=[1.0], seeds=1)
    assert only.value == reports[0].value


def test_another_dataset(finished, tmp_path):
    path = str(write_npz(tmp_path / "other.npz", labels=[0, 1] * 30))
    (knn,) = evaluate_run(finished, backbone=base_of(finished.parent), dataset=path)
    assert (knn.metric, knn.dataset) == ("knn", path)
    same_classes = evaluate_run(finished, backbone=base_of(finished.parent), dataset=path, metrics=["accuracy"])
    assert same_classes[0].settings["test_images"] == 24
    nameless = str(write_npz(tmp_path / "nameless.npz", named=False))
    with pytest.raises(
        ValueError, match=r"The head of .* was trained for other classes than those of .*nameless\.npz"
    ):
        evaluate_run(finished, backbone=base_of(finished.parent), dataset=nameless, metrics=["accuracy"])


def test_mistakes_are_found_before_anything_is_loaded(tmp_path):
    for options, message in (
        ({"metrics": ["kn"]}, r"Unknown metric 'kn'; there are knn, linear_probe, accuracy\. Did you mean knn\?"),
        ({"low_shot": [10.0]}, r"must lie in \(0, 1\]; got 10\.0: 10 % of the labels is 0\.1"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_run(tmp_path, **options)


def test_the_base_alone_has_no_accuracy(finished):
    with pytest.raises(ValueError, match="The frozen base has no head of its own, so no accuracy"):
        evaluate_run(finished, backbone=base_of(finished.parent), base=True, metrics=["accuracy"])


def test_the_objective_is_not_needed_any_more(finished, tmp_path):
    summary = RunSummary.load(finished)
    for file in finished.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    replace(summary, arguments={**summary.arguments, "objective": "/gone/mine.py:Loss"}).save(tmp_path)
    assert {
        report.metric: report.value for report in evaluate_run(tmp_path, backbone=base_of(finished.parent))
    } == summary.after


def test_a_run_that_moved(finished, tmp_path):
    summary = RunSummary.load(finished)
    elsewhere = tmp_path / "moved.py"
    elsewhere.write_text((finished.parent / "model.py").read_text())
    moved = replace(summary, arguments={**summary.arguments, "backbone": "/gone/model.py:build"})
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in finished.glob("adapter*"):
        (copy / file.name).write_bytes(file.read_bytes())
    moved.save(copy)
    with pytest.raises(ValueError, match=r"run\.json names '/gone/model\.py:build', a program"):
        evaluate_run(copy)
    reports = evaluate_run(copy, backbone=f"{elsewhere}:build", metrics=["knn"])
    assert reports[0].value == summary.after["knn"]
