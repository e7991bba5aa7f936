# SPDX-License-Identifier: Apache-2.0
"""`smn pack`, `unpack`, `inspect`, `verify` and `slice` on a real adapter in a folder: what they write and print."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from safetensors.torch import save_file

from smn_peft import MaskConfig, load_sliced
from smn_peft.backbones import load_from_file
from smn_peft.cli import app
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes

runner = CliRunner()

BUILD = """
import torch
from torch import nn

def build(seed={seed}):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False))
    model.mean, model.std, model.image_size = (0, 0, 0), (1, 1, 1), 16
    return model
"""


def smn(*args: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def base(tmp_path) -> str:
    (tmp_path / "model.py").write_text(BUILD.format(seed=0))
    return f"{tmp_path / 'model.py'}:build"


def adapter(base: str, folder: Path, **options) -> Path:
    model = get_peft_model(load_from_file(base).model, MaskConfig(target_modules=["0", "2"], **options))
    layer = model.base_model.model[2]
    generator = torch.Generator().manual_seed(0)
    weight = layer.base_layer.weight
    off = (weight.abs() > weight.abs().quantile(0.85)) & (torch.rand(weight.shape, generator=generator) < 0.3)
    layer.set_mask("default", layer.present_slots[0], ~off)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


def test_packing_and_unpacking_come_back_to_the_same_bytes(tmp_path, base):
    folder = adapter(base, tmp_path / "bits")
    printed = smn("pack", folder, "-o", tmp_path / "coded")
    before, after = adapter_sizes(folder), adapter_sizes(tmp_path / "coded")
    assert after.mask < 0.6 * before.mask
    assert f"{before.total:,} -> {after.total:,} bytes, masks {before.mask:,} -> {after.mask:,}" in printed
    assert (tmp_path / "coded" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    smn("unpack", tmp_path / "coded", "-o", tmp_path / "back")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    smn("pack", folder, "-o", folder)  # in place
    assert (folder / WEIGHTS_NAME).read_bytes() == (tmp_path / "coded" / WEIGHTS_NAME).read_bytes()
    assert json.loads((folder / CONFIG_NAME).read_text())["codec"] == "entropy"


def test_a_selective_adapter_takes_the_base(tmp_path, base):
    folder = adapter(base, tmp_path / "bits", trainable_fraction=0.2, select="magnitude")
    assert "--base leaves them out" in smn("pack", folder, "-o", tmp_path / "all")
    arguments = ("--backbone", base)
    smn("pack", folder, "-o", tmp_path / "part", *arguments)
    masks = [adapter_sizes(tmp_path / name).mask for name in ("bits", "all", "part")]
    assert masks[2] < masks[1] < masks[0]
    assert "selected" in smn("inspect", tmp_path / "part")
    assert "Load the adapter over its base" in smn("unpack", tmp_path / "part", "-o", tmp_path / "x", code=1)
    assert "takes the base" in smn("verify", tmp_path / "part", "--file-only")
    smn("unpack", tmp_path / "part", "-o", tmp_path / "back", *arguments)
    assert (tmp_path / "back" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_inspect_counts_what_numpy_counts(tmp_path, base):
    folder = adapter(base, tmp_path / "bits")
    smn("pack", folder, "-o", tmp_path / "coded")
    for place in ("bits", "coded", f"coded/{WEIGHTS_NAME}"):
        report = json.loads(smn("inspect", tmp_path / place, "--json"))
        first, second = report["layers"]
        assert first["name"] == "base_model.model.0.smn_mask"
        assert (first["weights"], first["active"], first["density"], first["entropy"]) == (432, 432, 1.0, 0.0)
        assert second["weights"] == 4608
        p = second["active"] / 4608
        assert second["entropy"] == pytest.approx(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
        sizes = adapter_sizes(tmp_path / place)
        assert report["sizes"] == vars(sizes)
        assert report["bits_per_weight"] == pytest.approx(8 * sizes.mask / 5040)
        assert report["density"] == pytest.approx((432 + second["active"]) / 5040)
    config = json.loads((folder / CONFIG_NAME).read_text())
    text = smn("inspect", tmp_path / "coded")
    assert "base_model.model.2.smn_mask" in text
    for fact in ("numbered", "all on", "checksum of the masks", config["base_fingerprint"], base, "entropy"):
        assert fact in text
    assert config["base_fingerprint"] in smn("inspect", tmp_path / "coded" / WEIGHTS_NAME)


def test_verify_says_what_holds(tmp_path, base):
    folder = adapter(base, tmp_path / "bits")
    smn("pack", folder, "-o", tmp_path / "coded")
    fingerprint = json.loads((folder / CONFIG_NAME).read_text())["base_fingerprint"]
    for place in (folder, tmp_path / "coded"):
        assert f"base: {fingerprint}" in smn("verify", place, "--backbone", base)
    assert "checksum crc32:" in smn("verify", tmp_path / "coded", "--file-only")
    assert "without a checksum" in smn("verify", folder, "--file-only")
    assert "add --file-only" in smn("verify", tmp_path / "coded" / WEIGHTS_NAME, code=1)
    smn("verify", tmp_path / "coded" / WEIGHTS_NAME, "--file-only")


def test_verify_refuses_another_base_even_where_loading_would_not(tmp_path, base):
    folder = adapter(base, tmp_path / "bits", check_base=False)
    (tmp_path / "other.py").write_text(BUILD.format(seed=1))
    printed = smn("verify", folder, "--backbone", f"{tmp_path / 'other.py'}:build", code=1)
    assert "was made for a base with fingerprint" in printed
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "base_fingerprint": None}))
    assert "names no fingerprint" in smn("verify", folder, "--backbone", base, code=1)


def test_verify_finds_a_flipped_bit(tmp_path, base):
    folder = adapter(base, tmp_path / "coded", codec="entropy")
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-9] ^= 4
    (folder / WEIGHTS_NAME).write_bytes(data)
    assert "error:" in smn("verify", folder, "--file-only", code=1)


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_what_is_no_adapter_is_refused(tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "error:" in smn(command, tmp_path / "empty", "-o", tmp_path / "out", code=1)
    save_file({"weight": torch.zeros(3)}, tmp_path / "empty" / WEIGHTS_NAME)
    for config, message in (("{", "damaged"), ("[]", "damaged"), ('{"format_version": 99}', "format version 99")):
        (tmp_path / "empty" / CONFIG_NAME).write_text(config)
        assert message in smn(command, tmp_path / "empty", "-o", tmp_path / "out", code=1)
    for field in ('"trainable_fraction": null', '"base_fingerprint": 5'):
        (tmp_path / "empty" / CONFIG_NAME).write_text(f"{{{field}}}")
        assert "must be" in smn(command, tmp_path / "empty", "-o", tmp_path / "out", code=1)
    (tmp_path / "empty" / CONFIG_NAME).write_text("{}")
    if command == "pack":
        assert "holds no mask" in smn(command, tmp_path / "empty", "-o", tmp_path / "out", code=1)
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists() or command == "unpack"


def test_unpacking_is_bounded(tmp_path, base):
    folder = adapter(base, tmp_path / "coded", codec="entropy")
    printed = smn("unpack", folder, "-o", tmp_path / "out", "--max-bytes", 100, code=1)
    assert "unpack to 630 bytes; at most 100" in printed
    assert not (tmp_path / "out").exists()


def test_inspect_names_what_is_not_there(tmp_path):
    assert "does not exist" in smn("inspect", tmp_path / "none", code=1)
    assert "neither a file, a folder nor an adapter on the Hub" in smn("inspect", "nobody/nothing", code=1)


def test_slicing_writes_the_smaller_model_and_says_what_it_saves(tmp_path, base):
    model = get_peft_model(load_from_file(base).model, MaskConfig(target_modules=["2"], granularity="column"))
    next(p for p in model.parameters() if p.requires_grad).data[:, :8] = -1
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    text = smn("slice", tmp_path / "adapter", "--backbone", base, "-o", tmp_path / "small.safetensors")
    assert "(0.500)" in text
    assert f"{(tmp_path / 'small.safetensors').stat().st_size:,} bytes" in text
    small = load_sliced(load_from_file(base).model, tmp_path / "small.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert small[0].out_channels == 8
    torch.testing.assert_close(small(images), model(images))
    smn("slice", tmp_path / "nowhere", "-o", tmp_path / "small.safetensors", code=1)
