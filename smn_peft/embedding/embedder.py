# SPDX-License-Identifier: Apache-2.0
"""`Embedder`: batches of images to the same with their embeddings, for `datasets.map` and Ray Data's `map_batches`."""

from __future__ import annotations

import copy
import json
import os
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone, pooled_features
from ..bank.store import FILE_NAME, open_store
from ..cascade import Cascade
from ..cascade.cascade import Mode
from ..cascade.folder import CASCADE_NAME
from ..data.decoding import as_rgb
from ..functional.features import require_finite_rows
from ..storage.fingerprint import fingerprint, tensor_digest
from ..storage.hub_files import locate_adapter
from ..training import TrainArguments, load_run
from ..training.assemble import evaluation_of, load_base

_BASE_OPTIONS = ("weights", "pretrained", "backbone_revision", "base_dtype", "image_size")
_PROCESS = os.getpid()


class Embedder:
    """Embeds batches of images: ``dataset.map(embedder, batched=True)``, ``data.map_batches(Embedder, …)``.

    It is pickled as its arguments and the digest of its weights. Whoever unpickles it loads the model again, and gets
    a RuntimeError if it is another one by now; the caches of `datasets` tell an adapter from the one that was in the
    same folder before.

    Args:
        base: Name of a backbone as in `smn train`; of an adapter's, where the base is now, if not where it says.
        adapter: Output folder of `smn train`, folder or Hub id of an adapter, folder of a cascade, or "bank:task" with
            the folder, file or Hub id of a bank; None for the base alone.
        mode: Embedding of a cascade; None: "conditional".
        column: Of the images, in forms that [`as_rgb`] takes.
        batch_size: Images per forward.
        device: None takes an accelerator where there is one; from the first batch on.
        options: Fields of `TrainArguments` that say more of a base alone: `weights`, `pretrained`,
            `backbone_revision`, `base_dtype` and `image_size`; of a run or adapter, `image_size`.

    Attributes:
        model: The model in eval mode.
        transform: uint8 (3, height, width) -> (3, size, size), as in training.
        preprocessing: What that does, JSON-compatible.
        dim: Size of an embedding.

    Raises:
        FileNotFoundError: If there is no such adapter, cascade or bank.
        ValueError: If the bank has no such task, the cascade no such mode, or what is given does not go together.
    """

    def __init__(
        self,
        base: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        *,
        mode: Mode | None = None,
        column: str = "image",
        batch_size: int = 64,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        own = {"mode": mode, "column": column, "batch_size": batch_size, "device": device}
        self._arguments: dict[str, Any] = {"base": base, "adapter": adapter, **own, **options}
        self.column, self.batch_size = column, batch_size
        loaded = _load(base, None if adapter is None else os.fspath(adapter), options)
        self._cascade = loaded if isinstance(loaded, Cascade) else None
        self.mode: Mode | None = mode
        if isinstance(loaded, Cascade):
            self.mode = mode or "conditional"
            loaded.check_modes([self.mode])
            whitening = loaded.projections.get(self.mode)
            loaded = loaded.backbone
            self.dim = loaded.feature_dim if whitening is None else len(whitening.components)
        elif mode is not None:
            raise ValueError(f"mode={mode!r} is of a cascade, and {adapter or base} is none: leave it out.")
        else:
            self.dim = loaded.feature_dim
        self.model, self.preprocessing = loaded.model, loaded.preprocessing
        self.transform = evaluation_of(loaded)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of all tensors that embeddings depend on, and of how images are prepared."""
        tensors = list(self.model.state_dict().values())
        if self._cascade is not None and self.mode is not None:
            tensors += self._cascade.tensors(self.mode)
        prepared = json.dumps(self.preprocessing, sort_keys=True)
        return fingerprint([prepared, *map(tensor_digest, tensors)], tensors[0].dtype)

    @cached_property
    def device(self) -> torch.device:
        """Where it computes; looked for when it is needed, since a process that is forked later could use no GPU."""
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(self._arguments["device"] or found or "cpu")

    @cached_property
    def _embed(self) -> Any:
        self.model.to(self.device)
        if self._cascade is None or self.mode is None:
            return partial(pooled_features, self.model)
        return partial(self._cascade.embed_batch, mode=self.mode)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Embed transformed images (batch, 3, size, size): fp32 (batch, dim) on the CPU, finite or a ValueError."""
        found: Tensor = self._embed(pixel_values.to(self.device)).float().cpu()
        require_finite_rows(found, "Embeddings")
        return found

    @torch.no_grad()
    def __call__(self, batch: Any) -> Any:
        """The batch, columns by name, with the column `embedding`, fp32 (n, dim) in numpy."""
        if self.column not in batch:
            raise ValueError(f"The batch has no column {self.column!r}; it has {', '.join(batch)}: pass column=.")
        # Of a copy: `datasets` encodes again, JPEGs with loss, what was read of the batch itself.
        values = copy.copy(batch)[self.column]
        found = [torch.empty(0, self.dim)]
        for start in range(0, len(values), self.batch_size):
            part = enumerate(values[start : start + self.batch_size], start)
            images = [self.transform(as_rgb(value, f"{self.column}, number {index}")) for index, value in part]
            found.append(self.features(torch.stack(images)))
        return batch | {"embedding": torch.cat(found).numpy()}

    def __reduce__(self) -> Any:
        return _unpickled, (self._arguments, self.digest)


def _unpickled(arguments: dict[str, Any], digest: str) -> Embedder:
    if os.getpid() != _PROCESS:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork; and each of several takes one core
    found = Embedder(**arguments)
    if found.digest != digest:
        named = arguments["adapter"] or arguments["base"]
        raise RuntimeError(f"{named} is another model than the one that was pickled: make a new Embedder of it.")
    return found


def _load(base: str | None, adapter: str | None, options: dict[str, Any]) -> Backbone | Cascade:
    known = _BASE_OPTIONS if adapter is None else ("image_size",)
    if unknown := [name for name in options if name not in known]:
        of = "a base" if adapter is None else "an adapter"
        raise ValueError(f"{unknown[0]} is no option of {of}; there are {', '.join(known)}: leave it out.")
    if adapter is None:
        if base is None:
            raise ValueError("Name a base, an adapter, or both.")
        return load_base(TrainArguments(backbone=base, **options))
    if (Path(adapter) / CASCADE_NAME).is_file():
        if options.get("image_size") is not None:
            raise ValueError(f"{adapter} is a cascade, which takes images of its own size: leave image_size out.")
        return Cascade.load(adapter, backbone=base)
    bank, task = (adapter, None) if Path(adapter).exists() or ":" not in adapter else adapter.rsplit(":", 1)
    if task is None and not _is_bank(adapter):
        return load_run(locate_adapter(adapter), backbone=base, **options)[1]
    with open_store(bank, read_only=True) as store, TemporaryDirectory() as folder:
        if not task:
            some = ", ".join(store.names()[:3])
            raise ValueError(f"{bank} is a bank: name one of its tasks, as in {bank}:TASK; it has {some} ….")
        try:
            store.export(task, Path(folder) / "adapter")
        except KeyError as error:
            raise ValueError(str(error.args[0]).replace("bank.names", f"smn bank ls {bank}")) from error
        return load_run(Path(folder) / "adapter", backbone=base, **options)[1]


def _is_bank(name: str) -> bool:
    path = Path(name)
    return (path / FILE_NAME).is_file() or (path.suffix == ".sqlite" and path.is_file())
