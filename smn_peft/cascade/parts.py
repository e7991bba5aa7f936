# SPDX-License-Identifier: Apache-2.0
"""What a cascade's folder holds beside its masks: names, router and projections; and how large all of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..evaluation import library_versions
from ..functional.features import Whitening
from ..storage import adapter_sizes
from .router import ROUTER_NAME, ROUTER_TENSORS_NAME, Router
from .tensors import read_json, read_tensors, read_whitening, whitening_tensors, write_json, write_tensors

__all__ = ["CASCADE_NAME", "MODES", "CascadeParts", "CascadeSizes", "Mode", "cascade_sizes"]

Mode = Literal["dispatcher", "whitened", "conditional", "unconditional"]
MODES: tuple[Mode, ...] = ("dispatcher", "whitened", "conditional", "unconditional")
CASCADE_NAME = "cascade.json"
_PROJECTION_NAME = "projection.safetensors"
_FORMAT = 1
_FACTS: dict[str, Any] = {"adapters": list, "router": bool, "embed_dim": (int, type(None)), "base_parameters": int}


@dataclass(frozen=True, eq=False)
class CascadeParts:
    """A cascade without its masks.

    Attributes:
        adapters: Names of the masks and of their folders, the dispatcher's first.
        router: None where nothing is routed.
        projections: Whitening by mode.
        embed_dim: Dims that were asked of the projections, None for the backbone's.
        base_parameters: Number of parameters of the base model.
    """

    adapters: Sequence[str]
    router: Router | None
    projections: Mapping[Mode, Whitening]
    embed_dim: int | None
    base_parameters: int

    def save(self, folder: Path) -> None:
        """Write router, projections and, when these are whole, ``cascade.json``."""
        if self.router is not None:
            self.router.save(folder)
        tensors = {
            f"{mode}.{name}": tensor
            for mode, whitening in self.projections.items()
            for name, tensor in whitening_tensors(whitening).items()
        }
        write_tensors(folder / _PROJECTION_NAME, tensors)
        facts = {"adapters": list(self.adapters), "router": self.router is not None, "embed_dim": self.embed_dim}
        facts |= {"base_parameters": self.base_parameters, "versions": library_versions()}
        write_json(folder / CASCADE_NAME, {"format": _FORMAT, **facts})

    @classmethod
    def load(cls, folder: Path) -> CascadeParts:
        """Read what [`save`] wrote.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is damaged, or they do not go together.
        """
        path = folder / CASCADE_NAME
        facts = read_json(path, _FACTS, _FORMAT)
        names = facts["adapters"]
        plain = all(isinstance(name, str) and Path(name).name == name and name != ".." for name in names)
        if not plain or len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(f"{path}: adapters must be names of two or more folders beside it; got {names}.")
        router = Router.load(folder) if facts["router"] else None
        if router is not None and router.experts != len(names) - 1:
            raise ValueError(f"{path} names {len(names) - 1} experts, and {ROUTER_NAME} knows {router.experts}.")
        modes = [mode for mode in MODES[1:] if mode != "conditional" or router is not None]
        shapes: dict[str, tuple[str | int, ...]] = {}
        for mode in modes:
            wide, kept = "F" if mode == "whitened" else "all F", f"dims of {mode}"
            shapes |= {f"{mode}.mean": (wide,), f"{mode}.components": (kept, wide)}
            shapes |= {f"{mode}.singular_values": (kept,), f"{mode}.samples": (1,)}
        tensors_path = folder / _PROJECTION_NAME
        tensors = read_tensors(tensors_path, shapes)
        projections = {mode: read_whitening(tensors, f"{mode}.", tensors_path) for mode in modes}
        one, whole = (len(projections[mode].mean) for mode in ("whitened", "unconditional"))
        if whole != one * len(names):
            raise ValueError(f"{tensors_path} is for {whole / one:g} masks, and {path} names {len(names)}.")
        return cls(names, router, projections, facts["embed_dim"], facts["base_parameters"])


@dataclass(frozen=True)
class CascadeSizes:
    """Bytes of a saved cascade by what they are for.

    Attributes:
        masks: Packed masks of dispatcher and experts.
        statistics: Their BatchNorm statistics.
        router: The router.
        projections: The whitening of every mode.
        total: All of these, with headers and configurations.
        paper: What the paper counts: (K + 1) · β/32, with β the bytes of the base's parameters in fp32.
    """

    masks: int
    statistics: int
    router: int
    projections: int
    total: int
    paper: int

    def text(self) -> str:
        """The sizes in a line for a terminal."""
        parts = f"masks {self.masks / 1e3:.1f} kB, statistics {self.statistics / 1e3:.1f} kB"
        rest = f"router {self.router / 1e3:.1f} kB, projections {self.projections / 1e3:.1f} kB"
        return f"{self.total / 1e3:.1f} kB ({parts}, {rest}); (K + 1) β/32 is {self.paper / 1e3:.1f} kB"


def cascade_sizes(folder: str | Path) -> CascadeSizes:
    """Bytes of what `Cascade.save` writes, of that folder or of the one that a cascade was trained in.

    Raises:
        FileNotFoundError: If there is no cascade.
    """
    folder = Path(folder)
    facts = read_json(folder / CASCADE_NAME, _FACTS, _FORMAT)
    sizes = [adapter_sizes(folder / name) for name in facts["adapters"]]
    configs = [folder / CASCADE_NAME, *(folder / name / "adapter_config.json" for name in facts["adapters"])]
    router = [folder / name for name in (ROUTER_NAME, ROUTER_TENSORS_NAME)] if facts["router"] else []
    router_bytes, projections = sum(map(_bytes, router)), _bytes(folder / _PROJECTION_NAME)
    total = sum(size.total for size in sizes) + sum(map(_bytes, configs)) + router_bytes + projections
    return CascadeSizes(
        masks=sum(size.mask for size in sizes),
        statistics=sum(size.statistics for size in sizes),
        router=router_bytes,
        projections=projections,
        total=total,
        paper=len(sizes) * facts["base_parameters"] * 4 // 32,
    )


def _bytes(path: Path) -> int:
    return path.stat().st_size
