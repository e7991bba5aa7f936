# SPDX-License-Identifier: Apache-2.0
"""A file loaded over a loaded adapter brings all that decides its answers, or is refused and changes nothing."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from smn_peft import MaskConfig
from smn_peft.storage.adapter_config import SETTINGS_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes, read_adapter_file
from smn_peft.storage.files import AdapterFileError
from smn_peft.storage.inspection import verify_adapter_file
from smn_peft.storage.repack import pack_adapter, unpack_adapter

from .test_identity import Net, X, config, saved


def trained(folder, base_seed=0, **options):
    """Save an adapter whose statistics have moved, if it has any; its output."""
    model = get_peft_model(Net(base_seed), config(**options))
    with torch.no_grad():
        model.train()(X + 1)
    model.eval().save_pretrained(folder)
    return model(X)


def picture(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        model(X),
        model.peft_config["default"],
    )


def assert_as_before(model, before):
    tensors, output, config = before
    assert torch.equal(model(X), output)
    assert model.peft_config["default"] is config
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())


ADAPT = {"batch_norm": "adapt"}
OPTIONS = [
    ({}, {"scale": False}),
    ({"scale": False}, {}),
    ({}, ADAPT),
    (ADAPT, {}),
    (ADAPT, {**ADAPT, "scale": False}),
    ({}, {"codec": "entropy", "trainable_fraction": 0.3, "select": "magnitude"}),
    ({"codec": "entropy", "trainable_fraction": 0.3}, {"codec": "entropy", "trainable_fraction": 0.3, "seed": 5}),
    ({}, {"mask_type": "topk", "density": 0.3}),
]


@pytest.mark.parametrize(("first", "second"), OPTIONS, ids=str)
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.filterwarnings("ignore:.*saved as bits")
def test_the_new_file_decides(first, second, is_trainable, tmp_path):
    trained(tmp_path / "one", **{"seed": 1, **first})
    expected = trained(tmp_path / "two", **{"seed": 2, **second})
    model = PeftModel.from_pretrained(Net(), tmp_path / "one", is_trainable=is_trainable).eval()
    model(X)
    model.load_adapter(tmp_path / "two", "default", is_trainable=is_trainable)
    assert torch.equal(model.eval()(X), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / "again").eval()(X), expected)


def test_names_of_classes_and_the_preparation_of_images_come_along(tmp_path):
    images = {"image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    saved(tmp_path / "one", id2label={0: "a"})
    saved(tmp_path / "two", id2label={1: "ship", 0: "bird"}, preprocessing=images)
    model = PeftModel.from_pretrained(Net(), tmp_path / "one")
    model.load_adapter(tmp_path / "two", "default")
    assert model.peft_config["default"].id2label == {0: "bird", 1: "ship"}
    assert model.peft_config["default"].preprocessing == images


def test_a_config_of_the_callers_does_not_win_over_the_file(tmp_path):
    expected = trained(tmp_path, scale=False)
    model = PeftModel.from_pretrained(Net(), tmp_path, config=config()).eval()
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="does not belong to this base"):
        PeftModel.from_pretrained(Net(1), tmp_path, config=config())
    other = get_peft_model(Net(), config()).eval()
    set_peft_model_state_dict(other, load_file(tmp_path / WEIGHTS_NAME))
    assert torch.equal(other(X), expected)


def damaged(tensors, values):
    return {**tensors, f"base_model.model.{SETTINGS_NAME}": values}


def bytes_of(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


BAD = {
    "another base": (lambda folder: saved(folder, Net(1), batch_norm="adapt"), "masked weights differ"),
    "another mask": (lambda folder: saved(folder, target_modules=["body"]), "1 missing"),
    "more masks": (lambda folder: saved(folder, target_modules=["body", "attn", "frozen"]), "frozen.smn_mask"),
    "biases": (lambda folder: saved(folder, mask_bias=True), "smn_bias_mask"),
    "no JSON": (lambda tensors: damaged(tensors, bytes_of("{")), "holds no settings"),
    "deep JSON": (lambda tensors: damaged(tensors, bytes_of("[" * 100_000)), "holds no settings"),
    "a list": (lambda tensors: damaged(tensors, bytes_of("[]")), "holds no settings"),
    "floats": (lambda tensors: damaged(tensors, torch.zeros(3)), "holds no settings"),
    "an odd value": (lambda tensors: damaged(tensors, bytes_of('{"trainable_fraction": 7}')), "says what no config"),
    "a later format": (lambda tensors: damaged(tensors, bytes_of('{"format_version": 9}')), "format version 9"),
    "weights": (lambda tensors: {**tensors, "base_model.model.head.weight": torch.zeros(3, 8)}, "head.weight"),
    "a frozen weight": (
        lambda tensors: {**tensors, "base_model.model.body.base_layer.weight": torch.zeros(8, 8)},
        "body.base_layer.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("options", [{}, {"batch_norm": "adapt"}], ids=str)
def test_what_is_refused_changes_nothing(name, options, tmp_path):
    change, message = BAD[name]
    trained(tmp_path / "one", **options)
    if "base" in name or "mask" in name or name == "biases":
        change(tmp_path / "two")
    else:
        saved(tmp_path / "two", **options)
        tensors = change(load_file(tmp_path / "two" / WEIGHTS_NAME))
        save_file(tensors, tmp_path / "two" / WEIGHTS_NAME)
    model = PeftModel.from_pretrained(Net(), tmp_path / "one").eval()
    before = picture(model)
    with pytest.raises((ValueError, AdapterFileError), match=message):
        model.load_adapter(tmp_path / "two", "default")
    assert_as_before(model, before)


def test_a_file_of_an_earlier_release_that_brings_statistics_is_refused_where_there_are_none(tmp_path):
    trained(tmp_path / "one")
    trained(tmp_path / "two", batch_norm="adapt")
    save_file(read_adapter_file(tmp_path / "two"), tmp_path / "two" / WEIGHTS_NAME)
    model = PeftModel.from_pretrained(Net(), tmp_path / "one")
    with pytest.raises(ValueError, match=r"norm.smn_running_mean"):
        model.load_adapter(tmp_path / "two", "default")


@pytest.mark.parametrize("options", [{"scale": False}, {"batch_norm": "adapt"}], ids=str)
def test_a_config_beside_the_weights_of_another_adapter_is_refused(options, tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "two", **options)
    (tmp_path / "one" / WEIGHTS_NAME).replace(tmp_path / "two" / WEIGHTS_NAME)
    base = Net()
    with pytest.raises(AdapterFileError, match=f"do not belong together: {next(iter(options))} is"):
        PeftModel.from_pretrained(base, tmp_path / "two")
    assert torch.equal(base.eval()(X), Net().eval()(X))


@pytest.mark.parametrize("codec", ["bits", "entropy"])
def test_tools_for_files_keep_the_settings_and_show_tensors_only(codec, tmp_path):
    expected = trained(tmp_path / "file", codec=codec, scale=False)
    assert not any(SETTINGS_NAME in key for key in read_adapter_file(tmp_path / "file"))
    assert adapter_sizes(tmp_path / "file").statistics == 0
    verify_adapter_file(tmp_path / "file")
    pack_adapter(tmp_path / "file", tmp_path / "packed")
    unpack_adapter(tmp_path / "packed", tmp_path / "bits")
    for name in ("file", "packed", "bits"):
        model = get_peft_model(Net(), config()).eval()
        model.load_adapter(tmp_path / name, "default")
        assert torch.equal(model.eval()(X), expected)


def test_an_adapter_that_trains_takes_the_files_base_too(tmp_path):
    saved(tmp_path, Net(1), save_scores=True)
    fresh = get_peft_model(Net(), MaskConfig(target_modules=["body", "attn"], save_scores=True))
    with pytest.raises(ValueError, match="does not belong to this base"):
        fresh.load_adapter(tmp_path, "default", is_trainable=True)
