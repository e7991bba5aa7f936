# SPDX-License-Identifier: Apache-2.0
"""`ServedModel` and `open_bank`: heads of any name, standardised ones included, and adapters of another base."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from smn_peft import MaskConfig
from smn_peft.backbones import Classifier
from smn_peft.bank.bank import MaskBank
from smn_peft.serving.bank import ServedModel, open_bank
from tests.bank.tiny import IMAGES, build


def headless():
    vit = build("vit")
    vit.reset_classifier(0)
    return vit


def test_a_standardised_head_and_one_of_another_name(tmp_path):
    model = get_peft_model(Classifier(headless(), 32, 3), MaskConfig(modules_to_save=["head"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "smn_" in name:
                parameter.copy_(0.99 - torch.rand_like(parameter))
        head = model.base_model.model.head.modules_to_save["default"]
        head.feature_mean.fill_(0.3)
        head.feature_std.fill_(2.0)
        model.save_pretrained(tmp_path)
        expected = PeftModel.from_pretrained(Classifier(headless(), 32, 3), tmp_path).eval()(IMAGES)
        with MaskBank.open([tmp_path], ServedModel(headless(), 32)) as bank:
            rows = bank(IMAGES, bank.names[0])
        torch.testing.assert_close(rows["logits"], expected, rtol=1e-4, atol=1e-4)
        assert rows["features"].shape == (3, 1, 32)
    served = ServedModel(headless(), 32, "head.fc")
    assert served.get_submodule("head.fc").in_features == 32
    for wrong in ("backbone", "head.", "", "forward", "a-b"):
        with pytest.raises(ValueError, match="no name for a head"):
            ServedModel(headless(), 32, wrong)


def test_adapters_of_another_base_are_left_out_and_none_at_all_is_an_error(saved, tmp_path):
    script = tmp_path / "base.py"
    script.write_text("from tests.serving.test_bank import headless as build\n")
    (tmp_path / "some").mkdir()
    for name, source in (("fine", "ships"), ("other", "birds")):
        (tmp_path / "some" / name).mkdir()
        for file in (saved[0] / source).glob("adapter_*"):
            (tmp_path / "some" / name / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "some" / "other" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_fingerprint": "float32:', '"base_fingerprint": "float32:0'))
    bank, backbone, left_out = open_bank(tmp_path / "some", f"{script}:build")
    with bank:
        assert bank.names == ["fine"]
        assert isinstance(backbone.model, ServedModel)
        assert (backbone.feature_dim, backbone.image_size) == (32, 32)
        assert "other" in left_out
    with pytest.raises(ValueError, match="None of the 1 adapters"):
        open_bank(config.parent, f"{script}:build")
    for where, base, options, error, message in (
        (tmp_path / "nowhere", f"{script}:build", {}, FileNotFoundError, "There is no .*nowhere: name a bank"),
        (tmp_path / "some", f"{script}:build", {"image_size": 64}, ValueError, "--weights and --image-size"),
        (tmp_path / "some", "no_such_net", {}, ValueError, "Unknown backbone"),
    ):
        with pytest.raises(error, match=message):
            open_bank(where, base, **options)
