# SPDX-License-Identifier: Apache-2.0
"""`Cascade`: a dispatcher, a router and experts over one base model, and the embedding that they make together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.utils.data import Subset

from ..backbones import Backbone
from ..evaluation import Features, extract_features
from ..functional.features import Whitening, fit_whitening
from ..training import RunSummary, TrainArguments, load_run
from ..training.assemble import evaluation_of
from ..training.saved import arguments_of
from .arguments import CascadeArguments
from .combine import conditional, unconditional
from .parts import CASCADE_NAME, MODES, CascadeParts, Mode
from .router import Router

__all__ = ["Cascade"]


class Cascade:
    """Several masks over one base in memory, one active at a time; they are switched in place.

    Embeddings come in four modes: ``"dispatcher"``, its features as they are; ``"whitened"``, these after PCA
    whitening, a control; and the paper's ``"conditional"`` (dispatcher and the routed expert, two forward passes per
    image) and ``"unconditional"`` (dispatcher and all experts, K + 1 passes), whitened to as many dims.

    Attributes:
        backbone: The base under all masks, adapters `dispatcher`, `expert-0`, ….
        adapters: Names of the masks, the dispatcher's first.
        router: None where nothing is routed, as in an ensemble of seeds: then there is no conditional mode.
        projections: By mode.
        embed_dim: Dims that were asked of the projections; None: as many as the backbone has features.
        summary: What the dispatcher's run was.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[str],
        router: Router | None,
        projections: Mapping[Mode, Whitening],
        summary: RunSummary,
    ) -> None:
        """Take the parts as they are; `fit`, `load` and `from_runs` make them."""
        self.backbone, self.adapters, self.router = backbone, list(adapters), router
        self.projections, self.summary = dict(projections), summary
        self.embed_dim: int | None = None

    @classmethod
    def fit(cls, arguments: TrainArguments, options: CascadeArguments | None = None) -> Cascade:
        """Train dispatcher, router and experts, and fit the projections; what is done is not done again.

        Args:
            arguments: Of the dispatcher, from which the experts' follow; `output_dir` is the cascade's folder.
            options: Of the cascade.

        Raises:
            ValueError: If arguments do not fit, a cluster is too small, or `output_dir` holds another cascade.
            Interrupted: After Ctrl-C, once a checkpoint is written; the same call goes on from it.
        """
        from .fit import fit_cascade

        fit_cascade(arguments, options or CascadeArguments())
        return cls.load(arguments.output_dir, backbone=arguments.backbone)

    @classmethod
    def from_runs(
        cls, folders: Mapping[str, str | Path], router: Router | None = None, *, backbone: str | None = None
    ) -> Cascade:
        """The masks of finished runs over their base, without projections.

        Args:
            folders: `output_dir` of each run by adapter name; the first is the dispatcher.
            router: Sends images to the others, in order.
            backbone: Where the base is now, if not where the first folder says.

        Raises:
            ValueError: If a mask belongs to another base, or the router has another number of experts.
        """
        names = list(folders)
        if router is not None and router.experts != len(names) - 1:
            raise ValueError(f"The router knows {router.experts} experts, but there are {len(names) - 1} masks.")
        first = folders[names[0]]
        summary = RunSummary.load(first)
        _, loaded = load_run(first, base=True, backbone=backbone)
        model: Any = PeftModel.from_pretrained(loaded.model, str(first), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(folders[name]), adapter_name=name)
        return cls(replace(loaded, model=model.eval()), names, router, {}, summary)

    # --- Embedding ---------------------------------------------------------------------------------------------------

    @property
    def arguments(self) -> TrainArguments:
        """The arguments of the dispatcher's run."""
        return arguments_of(self.summary, self.backbone.name)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes that this cascade can embed in."""
        return tuple(mode for mode in MODES if mode != "conditional" or self.router is not None)

    def features(self, images: Any, adapter: str, **options: Any) -> Features:
        """Features of a dataset under one mask; `options` as of `extract_features`."""
        model: Any = self.backbone.model
        model.set_adapter(adapter)
        if (accelerator := options.get("accelerator")) is not None:
            model.to(accelerator.device)
        transform = evaluation_of(self.backbone)
        return extract_features(model, images, transform, **{"batch_size": 64, **options})

    def raw(self, images: Any, modes: Sequence[Mode], **options: Any) -> tuple[dict[Mode, Tensor], Features]:
        """What the projections are applied to, in one pass over the data per mask.

        Where ``"unconditional"`` is asked for too, every expert sees every image; else only those routed to it.

        Args:
            images: Map-style dataset, as `extract_features` takes it.
            modes: Which to make.
            options: As of `extract_features`.

        Returns:
            fp32 (n, F) or (n, (K + 1) F) by mode, and the dispatcher's features with the labels.

        Raises:
            ValueError: For a mode that this cascade has not.
        """
        if unknown := [mode for mode in modes if mode not in self.modes]:
            raise ValueError(f"There is no mode {unknown[0]!r} here; there are {', '.join(self.modes)}.")
        dispatched = self.features(images, self.adapters[0], **options)
        found: dict[Mode, Tensor] = {mode: dispatched.features for mode in modes if mode in MODES[:2]}
        names = self.adapters[1:]
        experts: list[Tensor] = []
        if "unconditional" in modes:
            experts = [self.features(images, name, **options).features for name in names]
            found["unconditional"] = unconditional(dispatched.features, experts)
        if "conditional" in modes:
            assert self.router is not None
            route = self.router.assign(dispatched.features)
            rows = [(route == number).nonzero().squeeze(1) for number in range(len(names))]
            if not experts:
                nothing = dispatched.features[:0]
                parts = [Subset(images, chosen.tolist()) for chosen in rows]
                experts = [
                    self.features(part, name, **options).features if len(part) else nothing
                    for name, part in zip(names, parts, strict=True)
                ]
            else:
                experts = [expert[chosen] for expert, chosen in zip(experts, rows, strict=True)]
            found["conditional"] = conditional(dispatched.features, experts, route)
        return found, dispatched

    def embed_all(self, images: Any, modes: Sequence[Mode] = (), **options: Any) -> dict[Mode, Features]:
        """Embeddings in several modes, for K + 1 passes in all; see [`embed`]. No modes: all that there are."""
        chosen = list(modes) or list(self.modes)
        self._check_projections(chosen)
        raw, dispatched = self.raw(images, chosen, **options)
        white: dict[Mode, Tensor] = {
            mode: self.projections[mode](values) for mode, values in raw.items() if mode != "dispatcher"
        }
        return {mode: Features(white.get(mode, raw[mode]), dispatched.labels) for mode in chosen}

    def embed(self, images: Any, mode: Mode = "conditional", **options: Any) -> Features:
        """Embeddings of a dataset, in its order.

        Args:
            images: Map-style; items are ``{"image": uint8 (3, height, width) or PIL image, "label": int or absent}``.
            mode: Of [`modes`].
            options: `batch_size`, `num_workers`, `accelerator` … of `extract_features`.

        Returns:
            Features fp32 (n, dim): of the whitened modes centred and whitened by the training set.

        Raises:
            ValueError: For a mode that this cascade has not, or before the projections are fitted.
        """
        return self.embed_all(images, [mode], **options)[mode]

    def fit_projections(self, images: Any, dim: int | None = None, **options: Any) -> None:
        """Fit the whitening of every mode on the training images.

        Args:
            images: The training images.
            dim: Dims to keep; None: as many as the backbone has features.
            options: As of `extract_features`.
        """
        raw, _ = self.raw(images, self.modes, **options)
        kept, self.embed_dim = dim or self.backbone.feature_dim, dim
        self.projections = {
            mode: fit_whitening(values, min(kept, values.shape[1]))
            for mode, values in raw.items()
            if mode != "dispatcher"
        }

    def _check_projections(self, modes: Sequence[Mode]) -> None:
        for mode in modes:
            if mode in self.modes and mode != "dispatcher" and mode not in self.projections:
                raise ValueError(f"There is no projection for {mode!r} yet: call fit_projections(training images).")

    # --- Files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write everything into one folder: packed masks, router and projections, without pickle.

        A folder counts as a cascade once ``cascade.json`` is there, which is written last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CASCADE_NAME).unlink(missing_ok=True)
        model: Any = self.backbone.model
        model.save_pretrained(str(folder), selected_adapters=self.adapters, save_embedding_layers=False)
        self.summary.save(folder / self.adapters[0])
        self.save_parts(folder)

    def save_parts(self, folder: str | Path) -> None:
        """Write router, projections and ``cascade.json`` beside masks that are there."""
        self._check_projections(self.modes)
        base: Any = self.backbone.model
        parameters = sum(p.numel() for name, p in base.get_base_model().named_parameters() if "smn_" not in name)
        parts = CascadeParts(self.adapters, self.router, self.projections, self.embed_dim, parameters)
        parts.save(Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, backbone: str | None = None) -> Cascade:
        """Read what [`save`] or [`fit`] wrote; every embedding is then identical to the bit.

        Args:
            folder: The folder.
            backbone: Where the base is now, if not where the folder says.

        Raises:
            FileNotFoundError: If there is no cascade, or a part of it is missing.
            ValueError: If it is damaged, or names a program as its base and `backbone` does not.
        """
        folder = Path(folder)
        parts = CascadeParts.load(folder)
        folders = {adapter: folder / adapter for adapter in parts.adapters}
        found = cls.from_runs(folders, parts.router, backbone=backbone)
        fitted = len(parts.projections["whitened"].mean)
        if fitted != found.backbone.feature_dim:
            raise ValueError(
                f"{folder} was fitted on {fitted} features, and {found.backbone.name} has "
                f"{found.backbone.feature_dim}: it is another base. Name the right one as backbone."
            )
        found.projections, found.embed_dim = dict(parts.projections), parts.embed_dim
        return found

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what [`save`] writes; returns the repository's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload a cascade of masks")
        return str(address)
