# SPDX-License-Identifier: Apache-2.0
"""Configs whose fields hold something else than they should: an error that names the field, never a traceback."""

from __future__ import annotations

import json

import pytest

from smn_peft import MaskConfig
from smn_peft.storage import AdapterFileError, check_config, read_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
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
    ],
)
def test_a_field_of_another_kind(field, value, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SMN", field: value}))
    with pytest.raises(AdapterFileError, match=rf"adapter_config.json is damaged: {field} in .* must be"):
        read_config(tmp_path)


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
