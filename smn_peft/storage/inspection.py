# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file holds and whether it is whole, without its base: densities, entropy, sizes, provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..functional.packing import binary_entropy, popcount
from .adapter_config import CONFIG_NAME, is_settings, read_config, read_settings
from .adapter_file import AdapterSizes, adapter_sizes, check_adapter_file, coded_masks, purpose_of, read_adapter_file
from .codec.blob import LayerEntry
from .codec.layer import LayerCode
from .repack import MAX_UNPACKED, unpack_tensors

_PROVENANCE = "base_model_name_or_path revision base_fingerprint format_version peft_version auto_mapping".split()


@dataclass(frozen=True)
class LayerReport:
    """One mask, under its key; its weights are counted by whole bytes of bits, up to 7 more than the layer has."""

    name: str
    weights: int
    active: int
    density: float
    bits_per_weight: float
    entropy: float
    """Bits for each bit of mask, if every coded bit were drawn alone."""
    code: str

    @classmethod
    def of(cls, name: str, weights: int, active: int, size: int, entropy: float, code: str) -> LayerReport:
        """Report on a mask that takes `size` bytes."""
        whole = max(weights, 1)
        return cls(name, weights, active, active / whole, 8 * size / whole, entropy, code)


@dataclass(frozen=True)
class AdapterReport:
    """An adapter's file, and what its config, or a file's own settings, say of where it comes from."""

    codec: str
    layers: tuple[LayerReport, ...]
    total: LayerReport
    """All masks together; the table of coded ones counts."""
    sizes: AdapterSizes
    dtypes: tuple[str, ...]
    """Dtypes of head and statistics, in alphabetical order."""
    checksum: str | None
    """Checksum of the decoded masks as the file says it; None for bit-packed ones."""
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """Render everything as JSON."""
        facts = asdict(self)
        total = facts.pop("total")
        facts |= {name: total[name] for name in ("weights", "density", "bits_per_weight", "entropy")}
        return json.dumps(facts, indent=1)

    def __str__(self) -> str:
        rows = [("mask", "weights", "density", "bits/weight", "entropy", "code")]
        for of in (*self.layers, self.total):
            shares = f"{of.density:.4f}", f"{of.bits_per_weight:.4f}", f"{of.entropy:.4f}"
            rows.append((of.name, f"{of.weights:,}", *shares, of.code))
        names, *numbers, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([name.ljust(names), *(c.rjust(w) for c, w in zip(cells, numbers, strict=True)), code])
            for name, *cells, code in rows
        ]
        parts = [f"{name} {size:,}" for name, size in asdict(self.sizes).items() if name != "total" and size]
        facts = {"file": f"{self.sizes.total:,} bytes: {', '.join(parts)}"}
        if self.dtypes:
            facts["head and statistics"] = ", ".join(self.dtypes)
        if self.checksum is not None:
            facts["checksum of the masks"] = self.checksum
        facts |= {name: str(value) for name, value in self.provenance.items()}
        width = max(map(len, facts))
        return "\n".join([*lines, "", *(f"{name:<{width}}  {value}" for name, value in facts.items())])


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterReport:
    """Report on an adapter's file, or on that of a folder; AdapterFileError if it is damaged.

    Coded masks are not decoded, and none is compared with a base: see `smn verify`.
    """
    tensors = read_adapter_file(path, settings=True)
    settings = {name: read_settings(name, tensors.pop(name)) for name in list(tensors) if is_settings(name)}
    codec, checksum = "bits", None
    layers: list[LayerReport] = []
    if (coded := coded_masks(tensors)) is not None:
        prefix, blob = coded
        codec, checksum = "entropy", f"crc32:{blob.checksum:08x}"
        layers = [_coded(prefix, entry) for entry in blob.entries]
    else:
        for name, tensor in unpack_tensors(tensors, MAX_UNPACKED).items():  # checks them
            if purpose_of(name) == "mask":
                weights, active = 8 * tensor.numel(), popcount(tensor)
                entropy = binary_entropy(active / max(weights, 1))
                layers.append(LayerReport.of(name, weights, active, tensor.numel(), entropy, "bits"))
    sizes, weights = adapter_sizes(path), sum(layer.weights for layer in layers)
    entropy = sum(layer.entropy * layer.weights for layer in layers) / max(weights, 1)
    active = sum(layer.active for layer in layers)
    total = LayerReport.of(f"all {len(layers)}", weights, active, sizes.mask, entropy, codec)
    extras = [t for name, t in tensors.items() if purpose_of(name) in ("head", "statistics")]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in extras if t.is_floating_point()})
    has_config = (Path(path) / CONFIG_NAME).is_file()
    config: Mapping[str, Any] = read_config(path) if has_config else next(iter(settings.values()), {})
    provenance = {key: config[key] for key in _PROVENANCE if config.get(key) is not None}
    return AdapterReport(codec, tuple(layers), total, sizes, tuple(dtypes), checksum, provenance)


def _coded(prefix: str, entry: LayerEntry) -> LayerReport:
    weights, coded = 8 * entry.size, 8 * entry.coded
    kind = entry.code & 7
    code = LayerCode(kind).name.lower().replace("_", " ") if kind in set(LayerCode) else "unknown"
    entropy = binary_entropy(entry.inactive / max(coded, 1)) * coded / max(weights, 1)
    code += ", selected" if entry.selected else ""
    return LayerReport.of(f"{prefix}{entry.name}", weights, weights - entry.inactive, entry.length, entropy, code)


def verify_adapter_file(path: str | os.PathLike[str], limit: int = MAX_UNPACKED) -> list[str]:
    """Check all of a file, or of that in a folder, that can be checked without the base, and say what was found.

    AdapterFileError if it is damaged, or its masks together take more than `limit` bytes.
    """
    checksum = check_adapter_file(path)
    tensors = read_adapter_file(path)
    facts = [f"file: whole, {len(tensors)} tensors"]
    coded = coded_masks(tensors)
    if coded is not None and coded[1].needs_base:
        facts.append(f"masks: {len(coded[1].entries)}, coded (entropy); their checksum takes the base")
    else:
        count = sum(purpose_of(name) == "mask" for name in unpack_tensors(tensors, limit))
        kind = "bit-packed, without a checksum"
        if coded is not None:
            kind = f"coded (entropy), checksum crc32:{coded[1].checksum:08x} holds"
        facts.append(f"masks: {count}, {kind}")
    if checksum is not None:
        facts.append(f"settings, head and statistics: checksum {checksum} holds")
    return facts
