# SPDX-License-Identifier: Apache-2.0
"""The compression table against the compressors themselves, with and without what is optional."""

from __future__ import annotations

import bz2
import lzma
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smn_peft.analysis.compression import adapter_compression, compression_table, format_compression
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.storage.codec.blob import encode_masks


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.packbits(rng.random(40_000) < share) for name, share in (("b", 0.9), ("a", 0.99))}


def test_every_row_is_what_its_compressor_makes():
    weights = np.random.default_rng(0).standard_normal(5000).astype(np.float32).tobytes()
    table = compression_table(masks(), weights)
    packed = b"".join(masks()[name].tobytes() for name in ("a", "b"))
    rows = {row.method: row for row in table.rows}
    assert rows["uncompressed"].mask_bytes == len(packed) == 10_000
    assert rows["uncompressed"].weight_bytes == 20_000
    assert rows["bz2"].mask_bytes == len(bz2.compress(packed, 9))
    assert rows["lzma"].mask_bytes == len(lzma.compress(packed, preset=6))
    assert rows["lzma"].weight_bytes == len(lzma.compress(weights, preset=6))
    assert rows["smn_peft"].mask_bytes == len(encode_masks(masks()))
    assert rows["smn_peft"].weight_bytes is None
    assert rows["smn_peft"].mask_bytes < rows["lzma"].mask_bytes
    p = np.array([np.unpackbits(mask).mean() for mask in masks().values()])
    assert table.density == pytest.approx(p.mean())
    assert table.entropy == pytest.approx((-p * np.log2(p) - (1 - p) * np.log2(1 - p)).mean())


def test_optional_compressors_are_rows_where_they_are_installed():
    pytest.importorskip("cramjam")
    table = compression_table(masks())
    assert table.missing == ()
    sizes = {row.method: row.mask_bytes for row in table.rows}
    assert sizes["zstd"] < sizes["lz4"] <= 10_200


def test_what_is_not_installed_is_left_out_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cramjam", None)
    table = compression_table(masks())
    assert table.missing == ("lz4", "snappy", "zstd")
    text = format_compression(table)
    assert "Not installed and left out: lz4, snappy, zstd (pip install 'smn_peft[compression]')." in text
    assert "| zstd" not in text


def test_the_table_of_an_adapter(tmp_path):
    tensors = {f"{name}.smn_mask": torch.from_numpy(mask) for name, mask in masks().items()}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    tensors = {"w": torch.randn(90).half(), "b": torch.randn(10).bfloat16(), "n": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    table = adapter_compression(tmp_path, tmp_path / "model.safetensors")
    assert table.weight_count == 100
    assert table.mask_weights == 80_000
    lines = format_compression(table).splitlines()
    assert lines[0].startswith("| compressor")
    assert "80,000 masked weights" in lines[-1] or "80,000 masked weights" in lines[-2]
    with pytest.raises(ValueError, match="no mask"):
        compression_table({})
    with pytest.raises(FileNotFoundError, match="name a safetensors file"):
        adapter_compression(tmp_path, tmp_path / "none")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        adapter_compression(tmp_path, tmp_path / "text.safetensors")
    save_file({"n": torch.arange(3)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="holds no floats"):
        adapter_compression(tmp_path, tmp_path / "whole.safetensors")
