# SPDX-License-Identifier: Apache-2.0
"""LoRA as a baseline: the rank that takes the mask's bytes, what trains, and that this is what is saved."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from smn_peft import MaskConfig, explain_targets
from smn_peft.training import TrainArguments, run
from smn_peft.training.assemble import (
    build_images,
    build_task,
    evaluation_of,
    lora_config,
    lora_sizes,
    matched_lora_rank,
)
from smn_peft.training.saved import load_run

from .tiny import SWAV, tiny_arguments


def test_the_rank_is_the_largest_that_fits(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    available = explain_targets(model, verbose=False).packed_bytes
    # By hand: factors of qkv, proj, fc1 and fc2 of width 192.
    per_rank = 4 * 2 * ((192 + 576) + (192 + 192) + (192 + 768) + (768 + 192))
    rank = matched_lora_rank(model, MaskConfig())
    assert rank * per_rank <= available < (rank + 1) * per_rank
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta or "lora" in name]
    adapted = get_peft_model(model, lora_config(model, MaskConfig()))
    adapted.save_pretrained(str(tmp_path))
    assert lora_sizes(tmp_path) == {
        "factors": rank * per_rank,
        "head": 0,
        "total": (tmp_path / "adapter_model.safetensors").stat().st_size,
    }


def test_convolutions_count_with_their_kernels():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=0)
    rank = matched_lora_rank(model, MaskConfig())
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    per_rank = sum(c.in_channels * c.kernel_size[0] ** 2 + c.out_channels for c in convolutions)
    assert rank == (11_166_912 // 8) // (4 * per_rank)


def test_no_rank_fits_layers_of_few_channels(tmp_path):
    with pytest.raises(
        ValueError, match=r"LoRA of rank 1 takes [\d,]+ bytes, the mask .* [\d,]+: .* as in lora_rank=1"
    ):
        run(tiny_arguments(tmp_path, adapt="lora"))


@pytest.mark.parametrize("options", [{}, {**SWAV, "batch_size": 12}], ids=["supervised", "swav"])
def test_a_run_saves_what_it_trained_and_nothing_else_moves(tmp_path, options):
    arguments = tiny_arguments(tmp_path, adapt="lora", lora_rank=2, lr=0.1, epochs=4, **options)
    images = build_images(arguments)
    task, backbone = build_task(arguments, images)
    names = {adapted: [n for n, _, a in task.trainable() if a is adapted] for adapted in (True, False)}
    assert all(".lora_" in name for name in names[True])
    assert not [name for name in names[False] if ".lora_" in name]
    summary = run(arguments)
    assert summary.density is None
    assert summary.after != summary.before
    assert summary.sizes["total"] > summary.sizes["factors"] > 0
    assert (summary.sizes["head"] > 0) == (not options)
    _, loaded = load_run(tmp_path / "out", backbone=arguments.backbone)
    base = dict(backbone.model.named_buffers())  # what was loaded and not trained
    for name, buffer in loaded.model.get_base_model().named_buffers():
        if "running" in name:
            assert torch.equal(buffer, base[name.replace("base_layer.", "")])
    pixel_values = evaluation_of(loaded)(images.test[0]["image"])[None]
    with torch.no_grad():
        assert not torch.equal(loaded.features(pixel_values), backbone.features(pixel_values))
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max(float(t.abs().max()) for name, t in factors.items() if "lora_B" in name) > 0


def test_statistics_of_lora_are_the_bases():
    with pytest.raises(ValueError, match=r"adapt='lora' keeps the base's BatchNorm statistics: set mask\.batch_norm="):
        TrainArguments(backbone="a", dataset="b", adapt="lora", mask={"batch_norm": "adapt"})
