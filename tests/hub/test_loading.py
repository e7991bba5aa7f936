# SPDX-License-Identifier: Apache-2.0
"""The code of a card, for every way in which a base is made, compiles and names what it needs."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone, load_classifier
from smn_peft.hub import push_run
from smn_peft.hub.card import loading_code
from smn_peft.hub.facts import base_code
from tests.hub.folders import code_of

TIMM = {"base_model_class": "ResNet", "parent_library": "timm.models.resnet"}


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (
            {"auto_mapping": TIMM, "base_model_name_or_path": "timm/resnet18.a1_in1k"},
            {},
            "hf-hub:timm/resnet18.a1_in1k",
        ),
        ({"auto_mapping": TIMM, "base_model_name_or_path": "resnet18.a1_in1k"}, {}, 'create_model("resnet18.a1_in1k"'),
        ({"base_model_name_or_path": None}, {}, "base = ...  #"),
        ({}, {"backbone": "a/b", "image_size": 64}, 'load_backbone("a/b", image_size=64)'),
        (
            {},
            {"backbone": "a/b", "objective": "zero_shot", "backbone_revision": "v1"},
            'revision="v1", projection=True',
        ),
        ({}, {"backbone": "a/b", "weights": "/x/w.safetensors"}, 'state_dict="w.safetensors"'),
        ({}, {"backbone": "resnet18", "pretrained": False, "seed": 3}, "torch.manual_seed(3)"),
        ({}, {"backbone": "a/b", "head_classes": 7, "seed": 2}, "load_classifier(backbone, 7, head_seed=2)"),
        ({}, {"backbone": "/me/m.py:build", "image_size": 64}, 'load_from_file("m.py:build")'),
    ],
)
def test_the_base(tmp_path, config, arguments, expected):
    code = loading_code(base_code(tmp_path, config, arguments), "user/x", "task", "dev")
    compile(code, "card", "exec")
    assert expected in code
    assert code.startswith("import smn_peft  # registers")
    assert code.endswith('PeftModel.from_pretrained(base, "user/x", subfolder="task", revision="dev").eval()')


@pytest.mark.parametrize("classes", [None, 5])
def test_the_code_of_a_transformers_base_on_the_hub_runs(hub, tmp_path, classes):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).push_to_hub("user/vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).push_to_hub("user/vit")
    if classes is None:
        base, options = transformers.ViTModel.from_pretrained("user/vit"), {}
    else:
        base = load_classifier(load_backbone("user/vit"), classes).model
        options = {"modules_to_save": ["head"]}
    model = get_peft_model(base, MaskConfig(init_weights=False, **options)).eval()
    model.save_pretrained(tmp_path / "out")
    push_run(tmp_path / "out", "user/mask")
    code = code_of(hub.tree("user/mask")["README.md"].decode())
    assert ("load_classifier(backbone, 5)" in code) is (classes is not None)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, found = model(images), names["model"](images)
    if classes is None:
        expected, found = expected.last_hidden_state, found.last_hidden_state
    assert torch.equal(found, expected)
