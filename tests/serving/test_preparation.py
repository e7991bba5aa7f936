# SPDX-License-Identifier: Apache-2.0
"""Images are prepared for a task as its adapter was trained, and what is done otherwise is said."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from fastapi.testclient import TestClient
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from smn_peft import MaskConfig
from smn_peft.backbones import Backbone
from smn_peft.bank.bank import MaskBank
from smn_peft.data import preprocessing_transform
from smn_peft.data.decoding import decode_rgb
from smn_peft.serving.app import build_app
from smn_peft.serving.bank import ServedModel, add_folder, open_bank
from smn_peft.serving.service import Service
from smn_peft.storage.adapter_config import CONFIG_NAME
from tests.serving.test_app import BEARER, close, files, refused
from tests.serving.tiny import DENSITIES, IMAGES, KEY, MEAN, STD, URL, service

OTHER = {
    "image_size": 32,
    "mean": [0.2, 0.3, 0.4],
    "std": [0.3, 0.2, 0.1],
    "interpolation": "bilinear",
    "crop_pct": 0.8,
}


def trained_with(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def expected(model, preprocessing, data):
    image = preprocessing_transform(preprocessing)(decode_rgb(data, "x"))
    with torch.no_grad():
        return model(image[None])[0]


def test_each_task_gets_the_image_as_it_was_trained(saved, tmp_path):
    from tests.bank.tiny import build

    root = shutil.copytree(saved[0], tmp_path / "tasks")
    trained_with(root / "ships", preprocessing=OTHER, id2label={"1": "boat"})
    model = PeftModel.from_pretrained(build("vit"), str(saved[0] / "ships")).eval()
    with TestClient(build_app(service(root)), URL) as client:
        results = client.post("/v1/predict", **files(IMAGES[1], *DENSITIES, logits="1")).json()["results"]
        for result in results:
            own = expected(model, OTHER, IMAGES[1]) if result["task"] == "ships" else saved[1][result["task"]][1]
            close(result["logits"], own)
            assert "warning" not in result
        assert not torch.allclose(expected(model, OTHER, IMAGES[1]), saved[1]["ships"][1], atol=0.01)
        assert {entry["label"] for entry in results[1]["top"]} == {"0", "boat", "2", "3"}
        assert client.get("/v1/models/ships").json()["preprocessing"] == OTHER
        assert client.get("/v1/models/birds").json()["preprocessing"]["mean"] == list(MEAN)


@pytest.fixture
def resnets(tmp_path):
    """A service over tasks of a ResNet that were trained on 32 and on 48 pixels, and their models."""
    models = {}
    for seed, size in enumerate((32, 48)):
        torch.manual_seed(0)
        model = get_peft_model(timm.create_model("test_resnet", num_classes=3), MaskConfig(modules_to_save=["fc"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "smn_" in name:
                parameter.data = 0.95 - torch.rand_like(parameter)
        way = {**OTHER, "image_size": size}
        model.eval().save_pretrained(str(tmp_path / f"at-{size}"))
        trained_with(tmp_path / f"at-{size}", preprocessing=way)
        models[f"at-{size}"] = model, way

    def serve(image_size=None):
        torch.manual_seed(0)
        base = timm.create_model("test_resnet", num_classes=3).eval()
        dim = base.num_features
        base.reset_classifier(0)
        base.name_or_path = ""
        backbone = Backbone(ServedModel(base, dim, "fc"), lambda image: image, dim, "resnet", 64, MEAN, STD)
        bank = MaskBank.open([], backbone.model, exclusive=True)
        for folder in sorted(tmp_path.glob("at-*")):
            add_folder(bank, folder.name, folder)
        return Service(bank, backbone, image_size=image_size, max_wait=0.05)

    return serve, models


def test_tasks_of_different_sizes_share_a_request(resnets):
    serve, models = resnets
    with TestClient(build_app(serve()), URL) as client:
        results = client.post("/v1/predict", **files(IMAGES[2], *models, logits="1")).json()["results"]
        for result in results:
            close(result["logits"], expected(*models[result["task"]], IMAGES[2]))


def test_another_size_is_used_where_it_is_asked_for_and_said(resnets):
    serve, models = resnets
    served = serve(image_size=48)
    assert served.warnings() == {"at-32": "It was trained on 32 pixels; the server prepares 48."}
    with TestClient(build_app(served), URL) as client:
        first, second = client.post("/v1/predict", **files(IMAGES[2], *models, logits="1")).json()["results"]
        model, way = models["at-32"]
        close(first["logits"], expected(model, {**way, "image_size": 48}, IMAGES[2]))
        assert first["warning"] == client.get("/v1/models/at-32").json()["warning"] == served.warnings()["at-32"]
        assert "warning" not in second


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {**OTHER, "std": [0, 0, 0]}, {**OTHER, "mean": ["a"]}, "x", [1]])
def test_a_way_that_cannot_be_followed_is_that_tasks_alone(saved, tmp_path, wrong):
    root = shutil.copytree(saved[0], tmp_path / "tasks")
    trained_with(root / "ships", preprocessing=wrong)
    with TestClient(build_app(service(root, names=["birds"]), api_key=KEY), URL) as client:
        answer = client.post("/v1/models", json={"name": "ships", "folder": str(root / "ships")}, headers=BEARER)
        if answer.status_code == 422:  # the bank refuses it
            return
        results = client.post("/v1/predict", **files(IMAGES[0], "ships", "birds", logits="1")).json()["results"]
        assert (results[0]["status"], "preprocessing" in results[0]["error"]) == (500, True)
        close(results[1]["logits"], saved[1]["birds"][0])
        refused(client.get("/v1/models/ships"), 500, "preprocessing")


def test_a_task_that_is_replaced_between_is_not_answered_wrongly(saved, tmp_path, monkeypatch):
    root = shutil.copytree(saved[0], tmp_path / "tasks")
    trained_with(root / "weather", preprocessing=OTHER)
    served = service(root, names=["ships"])
    forward = served.bank.forward

    def late(images, tasks):
        if tasks[0].name == "ships":
            served.bank.add("ships", root / "weather", replace=True)
            tasks = [served.bank.task("ships")]
        return forward(images, tasks)

    submit = served.batcher.submit
    monkeypatch.setattr(served.bank, "forward", late)
    monkeypatch.setattr(
        served.batcher,
        "submit",
        lambda *args: (served.bank.add("ships", root / "weather", replace=True), submit(*args))[1],
    )
    with TestClient(build_app(served), URL) as client:
        refused(client.post("/v1/predict", **files(IMAGES[0], "ships")), 503, "replaced meanwhile", "Ask again")


def test_a_bank_is_opened_over_the_base_of_its_tasks_size(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_vit", num_classes=3)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    small = timm.create_model("test_vit", num_classes=3, img_size=64)
    state = {key: value for key, value in base.state_dict().items() if key != "pos_embed"}
    small.load_state_dict(state, strict=False)
    model = get_peft_model(small, MaskConfig(modules_to_save=["head"]))
    model.save_pretrained(str(tmp_path / "tasks" / "a"))
    trained_with(tmp_path / "tasks" / "a", preprocessing={**OTHER, "image_size": 64}, unmasked_fingerprint=None)
    for options, size in (({}, 64), ({"image_size": 96}, 96)):
        bank, backbone, left_out = open_bank(
            tmp_path / "tasks", "test_vit", weights=tmp_path / "base.safetensors", **options
        )
        with bank:
            assert (backbone.image_size, left_out) == (size, {})
