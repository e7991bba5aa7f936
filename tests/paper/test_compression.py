# SPDX-License-Identifier: Apache-2.0
"""Tables 6 and 7 on tiny runs: the compressors' table of the mask and of the fine-tuned weights is in the record."""

from __future__ import annotations

import pytest

from smn_peft.paper import ARTEFACTS, reproduce

compression = pytest.importorskip("smn_peft.analysis.compression")


def test_mask_and_weights_are_compressed(tiny_scale, store):
    result = reproduce(ARTEFACTS["table6"], tiny_scale, output=store.folder)
    mask, full = (store.folder / "runs" / result.record["cells"][i]["runs"][0] for i in (0, 2))
    table = compression.adapter_compression(mask, full / "model.safetensors")
    assert result.record["details"]["mask_weights"] == table.mask_weights
    assert compression.format_compression(table) in result.text
    assert "| lzma " in result.text
