# SPDX-License-Identifier: Apache-2.0
"""Size, mean, deviation and class names go with the adapter: two files alone are evaluated as the run was."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from smn_peft.backbones import load_backbone
from smn_peft.serving.bank import class_names
from smn_peft.training import run
from smn_peft.training.saved import evaluate_run, load_run

from .tiny import CLASSES, SWAV, tiny_arguments


def write_timm(folder: Path) -> str:
    """A timm ViT of 32 pixels, which takes images of that size only, as a folder."""
    import timm

    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    loaded = load_backbone(
        "vit_tiny_patch16_224", state_dict=state, **{k: v for k, v in options.items() if k != "num_classes"}
    )
    loaded.model.save_pretrained(folder)
    return str(folder)


def write_vit(folder: Path) -> str:
    """A ViT of transformers of 32 pixels with its image processor."""
    torch.manual_seed(0)
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **size), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return str(folder)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("write", [write_vit, write_timm])
def test_two_files_alone_are_evaluated_at_the_size_they_were_trained_at(tmp_path, write):
    base = write(tmp_path / "base")
    arguments = tiny_arguments(tmp_path, backbone=base, image_size=16, epochs=1, eval_split="test")
    summary = run(arguments)
    # A server of these two files knows them.
    assert class_names(config_of(tmp_path / "out"), len(CLASSES)) == list(
        CLASSES
    )  # a server of these two files knows them
    config, out = config_of(tmp_path / "out"), tmp_path / "alone"
    assert config["preprocessing"]["image_size"] == 16
    assert config["id2label"] == {str(index): name for index, name in enumerate(CLASSES)}
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "out" / name, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for folder in (tmp_path / "out", out):
            for frozen, expected in ((False, summary.after), (True, summary.before)):
                (report,) = evaluate_run(folder, dataset=arguments.dataset, metrics=["knn"], base=frozen)
                if folder == out:  # a fresh run's own number of neighbours is another
                    _, loaded = load_run(folder, base=frozen)
                    assert loaded.preprocessing == config["preprocessing"]
                else:
                    assert report.value == expected["knn"]
    pixel_values = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected, found = (load_run(folder)[1].model(pixel_values) for folder in (tmp_path / "out", out))
    assert torch.equal(found, expected)


def test_another_size_is_said(tmp_path):
    arguments = tiny_arguments(tmp_path, image_size=24, epochs=1)
    run(arguments)
    with pytest.warns(UserWarning, match=r"out was trained on images of 24 pixels, and is used on 16, as image_size"):
        _, loaded = load_run(tmp_path / "out", image_size=16, backbone=arguments.backbone)
    assert loaded.image_size == 16
    (tmp_path / "out" / "run.json").unlink()
    with pytest.warns(UserWarning, match="trained on images of 24 pixels, and is used on 32"):
        _, loaded = load_run(tmp_path / "out", image_size=32, base=True, backbone=arguments.backbone)
    assert (loaded.image_size, loaded.mean) == (32, (0.5,) * 3)


@pytest.mark.parametrize("adapt", ["lora", "head"])
def test_what_has_no_config_of_ours_has_run_json(tmp_path, adapt):
    arguments = tiny_arguments(tmp_path, adapt=adapt, lr=0.01, image_size=24, epochs=1)
    run(arguments)
    model = tmp_path / "model.py"
    model.write_text(model.read_text().replace("(0.25,) * 3, 16", "(0.3,) * 3, 20"))  # of the base as it is now
    _, loaded = load_run(tmp_path / "out", backbone=arguments.backbone)
    assert (loaded.image_size, loaded.std) == (24, (0.25,) * 3)
    with pytest.warns(UserWarning, match="trained on images of 24 pixels, and is used on 16"):
        load_run(tmp_path / "out", image_size=16, backbone=arguments.backbone)


def test_without_a_head_there_are_no_names_and_a_masked_head_has_them(tmp_path):
    run(tiny_arguments(tmp_path, epochs=1, **SWAV))
    assert config_of(tmp_path / "out")["id2label"] is None
    run(tiny_arguments(tmp_path, epochs=1, head="masked", output_dir=str(tmp_path / "masked")))
    assert config_of(tmp_path / "masked")["id2label"] == dict(zip("012", CLASSES, strict=True))


def test_an_unusable_config_is_named_before_it_takes_memory(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1)
    run(arguments)
    path = tmp_path / "out" / "adapter_config.json"
    for run_json in (True, False):
        config = json.loads(path.read_text())
        config["preprocessing"]["image_size"] = 10**9
        path.write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=r"out: preprocessing: image_size must be a number of pixels from 1 to 4096"
        ):
            load_run(tmp_path / "out", backbone=arguments.backbone)
        if run_json:
            (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match="image_size must be at least 1 and at most 4096, or None; got 5000"):
        tiny_arguments(tmp_path, image_size=5000)
