# SPDX-License-Identifier: Apache-2.0
"""Configs whose fields hold something else than they should: an error that names the field, never a traceback."""

from __future__ import annotations

import json
import zlib

import pytest
import torch

from smn_peft import MaskConfig
from smn_peft.storage.adapter_config import (
    FORMAT_VERSION,
    check_config,
    check_format_version,
    check_settings,
    read_config,
    read_settings,
    settings_tensor,
)
from smn_peft.storage.files import AdapterFileError


def test_a_field_of_another_kind(tmp_path):
    for field, value in (
        ("trainable_fraction", "abc"),
        ("trainable_fraction", None),
        ("trainable_fraction", True),
        ("trainable_fraction", 0),
        ("trainable_fraction", float("nan")),
        ("seed", "x"),
        ("seed", 1.5),
        ("select", None),
        ("scale", "no"),
        ("check_base", 1),
        ("codec", ["x"]),
        ("base_fingerprint", 5),
        ("base_model_name_or_path", ["x"]),
        ("revision", {}),
        ("auto_mapping", 5),
        ("auto_mapping", {"base_model_class": 5}),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SMN", field: value}))
        with pytest.raises(AdapterFileError, match=rf"adapter_config.json is damaged: {field} is .* must be"):
            read_config(tmp_path)


def test_format_versions():
    for version in range(1, FORMAT_VERSION + 1):
        check_format_version(version)
    for version in (FORMAT_VERSION + 1, 10**9):
        message = f"format version {version}; this smn_peft reads up to {FORMAT_VERSION}.*pip install -U smn_peft"
        with pytest.raises(ValueError, match=message):
            check_format_version(version)
    for version in (0, -1, 1.0, "1", None, True, [1]):
        with pytest.raises(ValueError, match=r"format_version must be a positive integer, got .*damaged"):
            check_format_version(version)


def test_settings_are_what_the_config_says(tmp_path):
    config = {"threshold": 0.5, "seed": 3, "id2label": {0: "cat"}, "codec": "bits", "format_version": 1}
    tensor = settings_tensor(config, [])
    assert torch.equal(tensor, settings_tensor(dict(reversed(config.items())), []))
    expected = {"threshold": 0.5, "seed": 3, "id2label": {"0": "cat"}, "format_version": 1}
    assert read_settings("x.smn_settings", tensor) == expected
    for wrong in (
        tensor.float(),
        tensor[None],
        tensor[:-1],
        torch.frombuffer(bytearray(b"[" * 9999), dtype=torch.uint8),
    ):
        with pytest.raises(AdapterFileError, match=r"x\.smn_settings holds no settings of an adapter"):
            read_settings("x.smn_settings", wrong)
    with pytest.raises(ValueError, match="format version 9"):
        read_settings("x.smn_settings", settings_tensor({"format_version": 9}, []))


def test_settings_beside_coded_masks_are_small():
    config = MaskConfig(codec="entropy", id2label={0: "cat", 1: "dog"}).to_dict() | {
        "base_fingerprint": f"float32:{'0123456789abcdef' * 2}",
        "base_model_name_or_path": "timm/resnet18.a1_in1k",
    }
    tensor, plain = settings_tensor(config, []), settings_tensor({**config, "codec": "bits"}, [])
    assert len(tensor) < 150 < 400 < len(plain)
    assert read_settings("x", tensor) == read_settings("x", plain)
    assert check_settings("x", tensor, []) == check_settings("x", plain, [])
    damaged = tensor.clone()
    damaged[40] ^= 255
    bomb = torch.frombuffer(bytearray(b"\x01" + zlib.compress(b" " * (17 << 20), 9, -15)), dtype=torch.uint8)
    for wrong in (tensor[:-1], tensor[:1], damaged, bomb):
        with pytest.raises(
            AdapterFileError, match=r"x holds no settings of an adapter|x: settings, head and statistics"
        ):
            check_settings("x", wrong, [])


def test_what_is_no_object_or_no_text(tmp_path):
    for config in ([], 3, None):
        with pytest.raises(AdapterFileError, match="no JSON object"):
            check_config(config)
    with pytest.raises(AdapterFileError, match="a text that is none"):
        check_config({"id2label": {"0": "\ud800"}})
    with pytest.raises(ValueError, match="format version 77"):
        check_config({"format_version": 77})


def test_what_this_package_writes_is_taken(tmp_path):
    MaskConfig(target_modules=["fc"], revision="main", trainable_fraction=0.5).save_pretrained(tmp_path)
    assert read_config(tmp_path)["trainable_fraction"] == 0.5
    assert check_config({"base_model_name_or_path": "vögel"}) == {"base_model_name_or_path": "vögel"}
