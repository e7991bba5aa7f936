# SPDX-License-Identifier: Apache-2.0
"""The method's name in PEFT: a real member of `PeftType`, registered once, and never over somebody else's."""

from __future__ import annotations

import copy
import importlib
import json

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import smn_peft.tuner
from smn_peft import MaskConfig, MaskModel
from smn_peft.tuner import config as config_module
from tests.processes import sent


def test_smn_is_a_member_like_any_other():
    member = PeftType.SMN
    assert member is PeftType("SMN") is PeftType["SMN"] is config_module.SMN
    assert isinstance(member, PeftType)
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert "SMN" in PeftType.__members__
    assert (member.name, member.value, member == "SMN") == ("SMN", "SMN", True)
    assert repr(member) == "<PeftType.SMN: 'SMN'>"
    assert hash(member) == hash("SMN")
    assert json.dumps(member) == '"SMN"'
    assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)
    assert PeftType.LORA in PeftType
    with pytest.raises(ValueError, match="'SMNX' is not a valid PeftType"):
        PeftType("SMNX")


def test_the_mappings_know_it():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SMN] is MaskConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMN] is MaskModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SMN] == "smn_"
    assert isinstance(get_peft_config({"peft_type": "SMN", "target_modules": ["x"]}), MaskConfig)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, sent],
)
def test_copies_are_the_member_itself(copied):
    assert copied(PeftType.SMN) is PeftType.SMN
    config = MaskConfig(target_modules=["a", "b"], threshold=0.5, init_score=1.5)
    twin = copied(config)
    assert twin == config
    assert twin.peft_type is PeftType.SMN


def test_a_config_survives_json(tmp_path):
    config = MaskConfig(target_modules=["b", "a"], mask_type="topk", density=0.25, modules_to_save=["fc"], seed=4)
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["peft_type"] == "SMN"
    assert json.loads(text)["target_modules"] == ["a", "b"]
    for read in (MaskConfig.from_pretrained, PeftConfig.from_pretrained):
        loaded = read(str(tmp_path))
        assert type(loaded) is MaskConfig
        assert loaded.peft_type is PeftType.SMN
        assert loaded == config
    config.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "adapter_config.json").read_text() == text


def test_importing_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert config_module._peft_type() is PeftType.SMN
    importlib.reload(smn_peft.tuner)
    assert before == (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING))


def test_another_package_s_registration_is_not_replaced(monkeypatch):
    class Other(MaskModel):
        """A tuner of the same name, as PEFT itself or a fork may bring one."""

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SMN, Other)
    message = f"already registered by {__name__}: import only one of the two packages"
    with pytest.raises(ImportError, match=message):
        importlib.reload(smn_peft.tuner)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMN] is Other


def test_the_registry_is_peft_s_own():
    assert smn_peft.tuner.PEFT_TYPE_TO_TUNER_MAPPING is PEFT_TYPE_TO_TUNER_MAPPING
    assert peft.PeftType is PeftType
