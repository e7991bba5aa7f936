# SPDX-License-Identifier: Apache-2.0
"""`convert`: masks of fine-tuned runs, by their weights and by their outputs; what is refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.models import save_for_hf

from smn_peft.cli import app
from smn_peft.objectives import create_objective
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes
from smn_peft.training import convert, evaluate_run, load_masks, load_run, run
from smn_peft.training.metrics import read_metrics

from .tiny import tiny_arguments, write_model, write_npz

LONG = {"epochs": 40, "lr": 0.1, "batch_size": 24, "mask": {"codec": "entropy", "batch_norm": "adapt"}}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run that fine-tuned all weights, its base, and its images."""
    folder = tmp_path_factory.mktemp("tuned")
    run(tiny_arguments(folder, adapt="full", lr=0.003, optimizer="adamw", epochs=10), evaluate=False)
    return folder / "out", f"{folder / 'model.py'}:build", str(folder / "set.npz")


class Fixed(torch.nn.Module):
    """A teacher that says the same of any images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_the_loss_is_the_divergence_at_a_temperature():
    logits, wanted, batch = torch.randn(6, 4), torch.randn(6, 4), {"pixel_values": torch.zeros(6, 3, 2, 2)}
    options = {"options": {"temperature": 3.0}, "teacher": Fixed(wanted)}
    objective = create_objective("distillation", feature_dim=8, num_classes=4, **options)
    found = objective(lambda images: logits, batch)
    p, q = (each.div(3).softmax(1) for each in (wanted, logits))
    torch.testing.assert_close(found["loss"], 9 * (p * (p.log() - q.log())).sum(1).mean())
    assert found["agreement"] == (logits.argmax(1) == wanted.argmax(1)).float().mean()
    assert not objective.state_dict()
    assert objective(lambda images: wanted, batch)["loss"].abs() < 1e-6
    with pytest.raises(ValueError, match="logits of the same classes"):
        objective(lambda images: logits[:, :3], batch)


def test_the_nearest_mask_keeps_what_is_nearer_to_the_tuned_weight_than_zero(tmp_path, tuned):
    folder, base, _ = tuned
    with pytest.warns(UserWarning, match=r"\d+ tensors that no mask holds were fine-tuned too, such as backbone\.bn1"):
        summary = convert(folder, tmp_path / "mask", {"mask": {"codec": "entropy"}, "adapt": "lora"}, backbone=base)
    assert summary.sizes["total"] == (tmp_path / "mask" / WEIGHTS_NAME).stat().st_size
    masks = load_masks(tmp_path / "mask", backbone=base)
    before, after = (load_run(folder, base=b, backbone=base)[1].model for b in (True, False))
    old, new = before.state_dict(), after.state_dict()
    assert masks
    for name, mask in masks.items():
        own, other = old[name.removeprefix("backbone.")], new[name]
        assert torch.equal(mask, (other - own).abs() <= other.abs())
    converted = load_run(tmp_path / "mask", backbone=base)[1].model.merge_and_unload()
    assert torch.equal(converted.head.weight, after.head.weight)
    (report,) = evaluate_run(tmp_path / "mask", backbone=base, metrics=["accuracy"])
    assert 0 < report.value <= 1


@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_a_mask_learns_the_outputs_without_labels(tmp_path, tuned, adapt):
    folder, base, dataset = tuned
    if adapt == "lora":
        options = {"adapt": "lora", "peft": {"r": 2}, "lr": 0.03, "optimizer": "adamw", "epochs": 10}
        run(tiny_arguments(tmp_path, **options, backbone=base, dataset=dataset), evaluate=False)
        folder = tmp_path / "out"
    summary = convert(folder, tmp_path / "mask", {"dataset": dataset, **LONG, "knn_k": 5}, backbone=base)
    lines = [line for line in read_metrics(tmp_path / "mask/metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["agreement"] > 0.8
    (teacher,) = evaluate_run(folder, backbone=base, metrics=["accuracy"])
    assert summary.after["accuracy"] > teacher.value - 0.15
    assert summary.density < 1


def test_images_of_other_classes_will_do_and_are_not_evaluated(tmp_path, tuned):
    folder, base, _ = tuned
    for split, label in (("train", "this"), ("train", "that"), ("test", "this"), ("test", "that")):
        place = tmp_path / "images" / split / label
        place.mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (20, 20), (20 * index, 255 - 20 * index, 90)).save(place / f"{index}.png")
    values = {"dataset": str(tmp_path / "images"), **LONG, "epochs": 2, "knn_k": 5}
    summary = convert(folder, tmp_path / "mask", values, backbone=base)
    assert "accuracy" not in summary.after
    assert load_run(tmp_path / "mask", backbone=base)[1].model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def save_timm(folder, classes=(), **changes):
    """A repository as timm writes it, of a tiny ResNet with a classifier of two classes, if any are named."""
    torch.manual_seed(changes.pop("seed", 0))
    options = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 8, **changes}
    model = timm.create_model("resnet18", num_classes=len(classes), **options)
    save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    if classes:
        config["label_names"] = list(classes)
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def test_a_checkpoint_of_timm(tmp_path):
    save_timm(tmp_path / "base")
    tuned = save_timm(tmp_path / "tuned", ("cat", "dog", "cow"), seed=1)
    values = {"mask": {"codec": "entropy", "batch_norm": "adapt"}}
    convert(tmp_path / "tuned", tmp_path / "mask", values, backbone=str(tmp_path / "base"))
    config = json.loads((tmp_path / "mask" / "adapter_config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "cow"}
    model = load_run(tmp_path / "mask")[1].model.merge_and_unload()
    torch.testing.assert_close(model.head.weight, tuned.fc.weight)
    dataset = str(write_npz(tmp_path / "set.npz"))
    values |= {"dataset": dataset, "epochs": 1, "batch_size": 12, "knn_k": 5}
    file = str(tmp_path / "tuned" / "model.safetensors")
    for source, backbone in ((tmp_path / "tuned", str(tmp_path / "base")), (file, "resnet18")):
        if source == file:  # of an architecture with its own arguments there is no name
            with pytest.raises(ValueError, match="The weights do not fit resnet18"):
                convert(source, tmp_path / "other", values, backbone=backbone)
        else:
            summary = convert(source, tmp_path / "trained", values, backbone=backbone)
    assert "accuracy" not in summary.after  # the classes of the images have other names
    assert summary.arguments["classes"] == ["cat", "dog", "cow"]
    with pytest.raises(ValueError, match=r"holds run\.json of a finished run"):
        convert(tmp_path / "tuned", tmp_path / "mask", backbone=str(tmp_path / "base"))


def test_a_checkpoint_at_another_size(tmp_path):
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
    for name, size, classes in (("base", 32, 0), ("tuned", 48, 2)):
        args = {**options, "img_size": size}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **args)
        save_for_hf(model, str(tmp_path / name), model_args=args, safe_serialization=True)
        (tmp_path / name / "pytorch_model.bin").unlink(missing_ok=True)
    summary = convert(tmp_path / "tuned", tmp_path / "mask", backbone=str(tmp_path / "base"))
    assert summary.arguments["image_size"] == 48
    assert load_run(tmp_path / "mask")[1].model(torch.zeros(1, 3, 48, 48)).shape == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": (16, 16, 32, 64)},
            r"is not .*base fine-tuned: \d+ weights are missing .* such as timm_model\.layer4",
        ),
        ({"layers": (1, 1, 1, 2)}, r"\d+ weights are missing on one side .* such as timm_model\.layer4\.1"),
        ({"std": [0.5, 0.5, 0.5]}, r"normalised with std \(0\.5, 0\.5, 0\.5\), those of .*base with \(0\.229"),
    ],
)
def test_another_base(tmp_path, changes, message):
    std = changes.pop("std", None)
    save_timm(tmp_path / "base")
    save_timm(tmp_path / "tuned", ("cat", "dog"), **changes)
    if std:
        config = json.loads((tmp_path / "tuned" / "config.json").read_text())
        config["pretrained_cfg"]["std"] = std
        (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "tuned", tmp_path / "mask", backbone=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="is no run of `smn train`, which would name its base: name it by --backbone"):
        convert(tmp_path / "tuned", tmp_path / "mask")
    assert not (tmp_path / "mask").exists()


def test_it_goes_on_where_it_stopped(tmp_path, tuned):
    folder, base, dataset = tuned
    values = {"dataset": dataset, **LONG, "keep_checkpoints": 100, "checkpoint_every": 4, "eval_split": None}
    convert(folder, tmp_path / "whole", values, backbone=base)
    part = tmp_path / "part"
    part.mkdir()
    steps = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    steps[2].rename(part / steps[2].name)
    convert(folder, part, {**values, "resume": True}, backbone=base)
    assert (tmp_path / "whole" / WEIGHTS_NAME).read_bytes() == (part / WEIGHTS_NAME).read_bytes()


def test_the_command(tmp_path, tuned):
    folder, base, dataset = tuned
    words = ["convert", folder, "--backbone", base, "--mask.codec", "entropy", "--output-dir"]
    result = CliRunner().invoke(app, [*map(str, words), str(tmp_path / "mask")])
    assert result.exit_code == 0, result.output
    assert f"file {adapter_sizes(tmp_path / 'mask').total / 1e3:.1f} kB" in result.output
    words = [*words, tmp_path / "more", "--dataset", dataset, "--epochs", "1", "--batch-size", "24", "--knn-k", "5"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output


def test_what_cannot_be_converted(tmp_path):
    run(tiny_arguments(tmp_path), evaluate=False)
    with pytest.raises(ValueError, match="holds a mask already"):
        convert(tmp_path / "out", tmp_path / "mask", backbone=write_model(tmp_path))
    with pytest.raises(ValueError, match="name it by --backbone"):
        convert(tmp_path / "nowhere", tmp_path / "mask")
    with pytest.raises(ValueError, match="Unknown backbone"):
        convert("nowhere", tmp_path / "mask", backbone=write_model(tmp_path))
    with pytest.raises(ValueError, match="The objective 'distillation' follows another model: use `smn convert`"):
        run(tiny_arguments(tmp_path, output_dir=str(tmp_path / "other"), objective="distillation"))
