# SPDX-License-Identifier: Apache-2.0
"""What an adapter holds, without its base: density, bits per weight and entropy of each layer, sizes, provenance."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

from torch import Tensor

from ..functional.packing import popcount
from .adapter_file import CONFIG_NAME, AdapterSizes, adapter_sizes, purpose_of, read_adapter_file, read_metadata
from .codec import BLOB_NAME, LayerCode, LayerEntry
from .repack import check_bits, coded_masks, read_config

__all__ = ["AdapterReport", "LayerReport", "binary_entropy", "inspect_adapter"]

_PROVENANCE = (
    "base_model_name_or_path",
    "revision",
    "base_fingerprint",
    "format_version",
    "peft_version",
    "auto_mapping",
)


def binary_entropy(share: float) -> float:
    """Entropy in bits of a coin that shows heads with this probability."""
    return sum(p * -log2(p) for p in (share, 1 - share) if p > 0) + 0.0  # a coin with one side has 0, not -0


@dataclass(frozen=True)
class LayerReport:
    """A layer's mask.

    A file has ⌈N/8⌉ bytes for N weights and does not say N: `weights` is 8 bits for each byte, at most 7 more than N,
    and the same where N is a multiple of 8.

    Attributes:
        name: Key of the mask.
        weights: Number of bits.
        active: Number of bits that are on.
        code: How they are stored.
        bits_per_weight: Stored bits for each bit of mask.
        entropy: Entropy in bits for each bit of mask, if every coded bit were drawn alone: what `bits_per_weight` is
            compared with.
    """

    name: str
    weights: int
    active: int
    code: str
    bits_per_weight: float
    entropy: float

    @property
    def density(self) -> float:
        """Fraction of bits that are on."""
        return self.active / max(self.weights, 1)


@dataclass(frozen=True)
class AdapterReport:
    """An adapter's file and what its config says of where it comes from.

    Attributes:
        codec: ``"bits"`` or the codec of its blob.
        layers: Its masks.
        sizes: Bytes by purpose.
        dtypes: Dtypes of head and statistics, in alphabetical order.
        checksum: Checksum of the decoded masks as the file says it; None for bit-packed ones.
        provenance: What the config says: base, revision, fingerprint, versions; empty for a file alone.
    """

    codec: str
    layers: tuple[LayerReport, ...]
    sizes: AdapterSizes
    dtypes: tuple[str, ...]
    checksum: str | None
    provenance: dict[str, Any]

    @property
    def weights(self) -> int:
        """Bits of all masks."""
        return sum(layer.weights for layer in self.layers)

    @property
    def density(self) -> float:
        """Fraction of all bits that are on."""
        return sum(layer.active for layer in self.layers) / max(self.weights, 1)

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all masks in the file, table included, in bits for each bit of mask."""
        return 8 * self.sizes.mask / max(self.weights, 1)

    @property
    def entropy(self) -> float:
        """Entropy of the layers together, in bits for each bit of mask."""
        return sum(layer.entropy * layer.weights for layer in self.layers) / max(self.weights, 1)

    def to_json(self) -> str:
        """All of it as JSON, the totals included."""
        totals = {name: getattr(self, name) for name in ("weights", "density", "bits_per_weight", "entropy")}
        layers = [{**asdict(layer), "density": layer.density} for layer in self.layers]
        return json.dumps({**asdict(self), **totals, "layers": layers}, indent=1)

    def __str__(self) -> str:
        head = ("mask", "weights", "density", "bits/weight", "entropy", "code")
        rows = [
            (
                layer.name,
                f"{layer.weights:,}",
                f"{layer.density:.4f}",
                f"{layer.bits_per_weight:.4f}",
                f"{layer.entropy:.4f}",
                layer.code,
            )
            for layer in self.layers
        ]
        total = (f"{self.weights:,}", f"{self.density:.4f}", f"{self.bits_per_weight:.4f}", f"{self.entropy:.4f}")
        lines = [head, *rows, (f"all {len(rows)}", *total, self.codec)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(
                c.ljust(w) if i in (0, 5) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        parts = [f"{name} {size:,}" for name, size in asdict(self.sizes).items() if name != "total" and size]
        facts = {"file": f"{self.sizes.total:,} bytes: {', '.join(parts)}"}
        if self.dtypes:
            facts["head and statistics"] = ", ".join(self.dtypes)
        if self.checksum is not None:
            facts["checksum of the masks"] = self.checksum
        facts |= {name: str(value) for name, value in self.provenance.items()}
        width = max(map(len, facts))
        return "\n".join([*(line.rstrip() for line in table), "", *(f"{k:<{width}}  {v}" for k, v in facts.items())])


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterReport:
    """Look into an adapter's file; masks are neither decoded nor compared with a base, see `smn verify`.

    Args:
        path: The safetensors file, or the folder that holds it and its config.

    Raises:
        AdapterFileError: If the file is damaged.
        FileNotFoundError: If there is no such file.
    """
    tensors = read_adapter_file(path)
    layers: list[LayerReport] = []
    codec, checksum = "bits", None
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == BLOB_NAME:
            blob = coded_masks(name, tensor)
            codec, checksum = blob.codec, f"crc32:{blob.checksum:08x}"
            layers += [_coded(name.removesuffix(BLOB_NAME), entry) for entry in blob.entries]
        elif purpose_of(name) == "mask":
            check_bits(name, tensor)
            layers.append(_packed(name, tensor))
    extras = {name: t for name, t in tensors.items() if purpose_of(name) in ("head", "statistics")}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in extras.values() if t.is_floating_point()})
    provenance: dict[str, Any] = {}
    if Path(path).is_dir() and (Path(path) / CONFIG_NAME).is_file():
        config = read_config(path)
        provenance = {key: config[key] for key in _PROVENANCE if config.get(key) is not None}
    elif (base := read_metadata(path).get("smn_base")) is not None:
        provenance = {"base_fingerprint": base}
    return AdapterReport(codec, tuple(layers), adapter_sizes(path), tuple(dtypes), checksum, provenance)


def _packed(name: str, tensor: Tensor) -> LayerReport:
    weights, active = 8 * tensor.numel(), popcount(tensor)
    return LayerReport(name, weights, active, "bits", 1.0, binary_entropy(active / max(weights, 1)))


def _coded(shared: str, entry: LayerEntry) -> LayerReport:
    weights, coded = 8 * entry.size, 8 * entry.coded
    kind = entry.code & 7
    code = LayerCode(kind).name.lower().replace("_", " ") if kind in set(LayerCode) else "unknown"
    return LayerReport(
        name=f"{shared}{entry.name}",
        weights=weights,
        active=weights - entry.inactive,
        code=f"{code}, selected" if entry.selected else code,
        bits_per_weight=8 * entry.length / max(weights, 1),
        entropy=binary_entropy(entry.inactive / max(coded, 1)) * coded / max(weights, 1),
    )
