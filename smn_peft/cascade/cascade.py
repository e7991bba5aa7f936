# SPDX-License-Identifier: Apache-2.0
"""`Cascade`: a dispatcher, a router and experts over one base model, and the embedding that they make together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from ..backbones import Backbone, pooled_features
from ..evaluation import Features, extract_features, library_versions
from ..functional.features import Whitening, fit_whitening
from ..storage.adapter_config import CONFIG_NAME
from ..storage.adapter_file import adapter_sizes
from ..training import RunSummary, TrainArguments, load_run
from ..training.assemble import evaluation_of
from ..training.processes import build_accelerator
from ..training.saved import arguments_of
from . import folder as files
from .fit import DISPATCHER, CascadeArguments, dispatcher_arguments, expert_name, prepare, train_experts, train_once
from .folder import CASCADE_NAME
from .router import ROUTER_NAME, ROUTER_TENSORS_NAME, Router

Mode = Literal["dispatcher", "whitened", "conditional", "unconditional"]
MODES: tuple[Mode, ...] = get_args(Mode)
ENSEMBLE = "ensemble"
_SEEDS = "seeds"
_PROJECTION_NAME = "projection.safetensors"
_FACTS: dict[str, Any] = {"adapters": list, "router": bool, "embed_dim": (int, type(None)), "base_parameters": int}


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
        self, backbone: Backbone, adapters: Sequence[str], router: Router | None, summary: RunSummary
    ) -> None:
        """Take the parts as they are; `fit`, `load` and `from_runs` make them."""
        self.backbone, self.adapters, self.router, self.summary = backbone, list(adapters), router, summary
        self.projections: dict[Mode, Whitening] = {}
        self.embed_dim: int | None = None

    @classmethod
    def fit(cls, arguments: TrainArguments, options: CascadeArguments | None = None) -> Cascade:
        """Train dispatcher, router and experts, and fit the projections; what is done is not done again.

        `arguments` are the dispatcher's, from which the experts' follow; their `output_dir` is the cascade's folder.

        Raises:
            ValueError: If arguments do not fit, a cluster is too small, or `output_dir` holds another cascade.
            Interrupted: After Ctrl-C, once a checkpoint is written; the same call goes on from it.
        """
        options, folder = options or CascadeArguments(), Path(arguments.output_dir)
        accelerator = build_accelerator(arguments)
        router, images = prepare(arguments, options)
        train_experts(arguments, options, range(options.experts))

        def finish(into: Path, runs: Mapping[str, Path], router: Router | None) -> None:
            """Fit the projections and write the folder, unless it is there."""
            path = into / CASCADE_NAME
            facts = files.read_json(path, _FACTS) if path.is_file() else {}
            if (facts.get("adapters"), facts.get("embed_dim")) != (list(runs), options.embed_dim):
                cascade = cls.from_runs(runs, router, backbone=arguments.backbone)
                loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
                cascade.fit_projections(images, options.embed_dim, accelerator=accelerator, **loading)
                if accelerator.is_main_process:
                    cascade.save(into, masks=router is None)  # those of an ensemble lie elsewhere
            accelerator.wait_for_everyone()

        names = [DISPATCHER, *map(expert_name, range(options.experts))]
        finish(folder, {name: folder / name for name in names}, router)
        if options.ensemble:
            # The control: as many masks, each a dispatcher on all images with a seed of its own, combined alike.
            runs, trained = {DISPATCHER: folder / DISPATCHER}, False
            for seed in range(arguments.seed + 1, arguments.seed + 1 + options.experts):
                runs[f"seed-{seed}"] = path = folder / _SEEDS / f"seed-{seed}"
                trained |= train_once(replace(dispatcher_arguments(arguments), seed=seed, output_dir=str(path)))
            if trained and accelerator.is_main_process:
                (folder / ENSEMBLE / CASCADE_NAME).unlink(missing_ok=True)
            accelerator.wait_for_everyone()
            finish(folder / ENSEMBLE, runs, None)
        return cls.load(folder, backbone=arguments.backbone)

    @classmethod
    def from_runs(
        cls, folders: Mapping[str, str | Path], router: Router | None = None, *, backbone: str | None = None
    ) -> Cascade:
        """The masks of finished runs over their base, without projections.

        Args:
            folders: `output_dir` of each run by adapter name; the first is the dispatcher.
            router: Sends images to the others, in order.
            backbone: Where the base is now, if not where the first folder says.
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
        return cls(replace(loaded, model=model.eval()), names, router, summary)

    @property
    def arguments(self) -> TrainArguments:
        """The arguments of the dispatcher's run."""
        return arguments_of(self.summary, self.backbone.name)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes that this cascade can embed in."""
        return tuple(mode for mode in MODES if mode != "conditional" or self.router is not None)

    def _features(self, pixel_values: Tensor, adapter: str) -> Tensor:
        """Features fp32 (batch, dim) of a batch under one mask, on the CPU."""
        model: Any = self.backbone.model
        model.set_adapter(adapter)
        return pooled_features(model, pixel_values).float().cpu()

    def _raw(self, pixel_values: Tensor, modes: Sequence[Mode]) -> dict[Mode, Tensor]:
        """What the projections are applied to, of a batch (batch, 3, height, width), by mode.

        Where "unconditional" is asked for too, every expert sees every image; else only those routed to it.
        """
        dispatched = self._features(pixel_values, self.adapters[0])
        found: dict[Mode, Tensor] = {mode: dispatched for mode in modes if mode in MODES[:2]}
        experts: list[Tensor] = []
        if "unconditional" in modes:  # [D(x), E_1(x), …, E_K(x)] (Eq. 10)
            experts = [self._features(pixel_values, name) for name in self.adapters[1:]]
            found["unconditional"] = torch.cat([dispatched, *experts], 1)
        if "conditional" in modes:  # [D(x), 0, …, E_R(x), …, 0] (Eq. 11)
            assert self.router is not None
            route, parts = self.router.assign(dispatched), [dispatched]
            for number, name in enumerate(self.adapters[1:]):
                rows = (route == number).nonzero().squeeze(1)
                part = torch.zeros_like(dispatched)
                if experts:
                    part[rows] = experts[number][rows]
                elif len(rows):
                    part[rows] = self._features(pixel_values[rows.to(pixel_values.device)], name)
                parts.append(part)
            found["conditional"] = torch.cat(parts, 1)
        return {mode: found[mode] for mode in modes}

    def _raw_of(self, images: Any, modes: Sequence[Mode], **options: Any) -> tuple[dict[Mode, Tensor], Tensor | None]:
        """What the projections are applied to, of a dataset, by mode, and its labels; one pass over the images."""
        if (accelerator := options.get("accelerator")) is not None:
            self.backbone.model.to(accelerator.device)
        widths: list[int] = []

        def joined(pixel_values: Tensor) -> Tensor:
            raw = self._raw(pixel_values, modes)
            widths[:] = [part.shape[1] for part in raw.values()]
            return torch.cat(list(raw.values()), 1)

        options = {"batch_size": 64, "function": joined, **options}
        found = extract_features(self.backbone.model, images, evaluation_of(self.backbone), **options)
        return dict(zip(modes, found.features.split(widths, 1), strict=True)), found.labels

    def _projected(self, raw: Tensor, mode: Mode) -> Tensor:
        return raw if mode == "dispatcher" else self.projections[mode](raw)

    def embed_batch(self, pixel_values: Tensor, mode: Mode = "conditional") -> Tensor:
        """Embed a batch (batch, 3, height, width) in eval mode: fp32 (batch, dim), on the CPU; see [`embed`]."""
        return self._projected(self._raw(pixel_values, [mode])[mode], mode)

    def tensors(self, mode: Mode) -> list[Tensor]:
        """All that an embedding depends on beside the tensors of the model."""
        found = [] if mode == "dispatcher" else [self.projections[mode]]
        router = self.router if mode == "conditional" else None
        if router is not None:
            found.append(router.whitening)
        tensors = [tensor for whitening in found for tensor in files.whitening_tensors(whitening).values()]
        return tensors + ([] if router is None else list(router.clusters.values()))

    def embed_all(self, images: Any, modes: Sequence[Mode] = (), **options: Any) -> dict[Mode, Features]:
        """Embeddings in several modes (none given: all), by one pass over the images; see [`embed`]."""
        chosen = list(modes) or list(self.modes)
        self.check_modes(chosen)
        raw, labels = self._raw_of(images, chosen, **options)
        return {mode: Features(self._projected(raw[mode], mode), labels) for mode in chosen}

    def embed(self, images: Any, mode: Mode = "conditional", **options: Any) -> Features:
        """Embeddings fp32 (n, dim) of a dataset, in its order; all but "dispatcher" whitened by the training set.

        `images` and `options` (`batch_size`, `num_workers`, `accelerator` …) are those of `extract_features`.
        """
        return self.embed_all(images, [mode], **options)[mode]

    def fit_projections(self, images: Any, dim: int | None = None, **options: Any) -> None:
        """Fit the whitening of every mode on the training images, to `dim` dims or as many as the backbone's."""
        raw, _ = self._raw_of(images, self.modes[1:], **options)
        kept, self.embed_dim = dim or self.backbone.feature_dim, dim
        self.projections = {mode: fit_whitening(values, min(kept, values.shape[1])) for mode, values in raw.items()}

    def check_modes(self, modes: Sequence[Mode]) -> None:
        """Refuse modes (`ValueError`) that this cascade has not, or for which no projection was fitted."""
        if unknown := [mode for mode in modes if mode not in self.modes]:
            raise ValueError(f"There is no mode {unknown[0]!r} here; there are {', '.join(self.modes)}.")
        for mode in modes:
            if mode != "dispatcher" and mode not in self.projections:
                raise ValueError(f"There is no projection for {mode!r} yet: call fit_projections(training images).")

    def save(self, folder: str | Path, *, masks: bool = True) -> None:
        """Write packed masks, router and projections into one folder, without pickle; ``cascade.json`` comes last.

        Without `masks`, those of the folder stay.
        """
        folder = Path(folder)
        model: Any = self.backbone.model
        if masks:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CASCADE_NAME).unlink(missing_ok=True)
            model.save_pretrained(str(folder), selected_adapters=self.adapters, save_embedding_layers=False)
            self.summary.save(folder / self.adapters[0])
        self.check_modes(self.modes)
        if self.router is not None:
            self.router.save(folder)
        tensors: dict[str, Tensor] = {}
        for mode, whitening in self.projections.items():
            tensors |= files.whitening_tensors(whitening, f"{mode}.")
        files.write_tensors(folder / _PROJECTION_NAME, tensors)
        parameters = sum(p.numel() for name, p in model.get_base_model().named_parameters() if "smn_" not in name)
        facts = {"adapters": self.adapters, "router": self.router is not None, "embed_dim": self.embed_dim}
        facts |= {"base_parameters": parameters, "versions": library_versions()}
        files.write_json(folder / CASCADE_NAME, facts)

    @classmethod
    def load(cls, folder: str | Path, *, backbone: str | None = None) -> Cascade:
        """Read what [`save`] or [`fit`] wrote; every embedding is then identical to the bit.

        `backbone` is where the base is now, if not where the folder says; a program has to be named.

        Raises:
            FileNotFoundError: If there is no cascade, or a part of it is missing.
            ValueError: If it is damaged, or of another base.
        """
        folder = Path(folder)
        tensors_path, facts = folder / _PROJECTION_NAME, files.read_json(folder / CASCADE_NAME, _FACTS)
        names = facts["adapters"]
        plain = all(isinstance(name, str) and Path(name).name == name and name != ".." for name in names)
        if not plain or len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(f"{folder}: adapters must be names of two or more folders in it; got {names}.")
        router = Router.load(folder) if facts["router"] else None
        found = cls.from_runs({name: folder / name for name in names}, router, backbone=backbone)
        shapes: dict[str, tuple[str | int, ...]] = {}
        for mode in found.modes[1:]:
            dim = found.backbone.feature_dim * (1 if mode == "whitened" else len(names))
            shapes |= files.whitening_shapes(dim, f"dims of {mode}", f"{mode}.")
        tensors = files.read_tensors(tensors_path, shapes)
        found.projections = {mode: files.read_whitening(tensors, tensors_path, f"{mode}.") for mode in found.modes[1:]}
        found.embed_dim = facts["embed_dim"]
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


@dataclass(frozen=True)
class CascadeSizes:
    """Bytes of a saved cascade by what they are for."""

    masks: int  # packed masks of dispatcher and experts
    statistics: int  # their BatchNorm statistics
    router: int
    projections: int  # the whitening of every mode
    total: int  # all of these, with headers and configurations
    paper: int  # as the paper counts: (K + 1) · β/32, with β the bytes of the base's parameters in fp32

    def text(self) -> str:
        """The sizes in a line for a terminal."""
        parts = f"masks {self.masks / 1e3:.1f} kB, statistics {self.statistics / 1e3:.1f} kB"
        rest = f"router {self.router / 1e3:.1f} kB, projections {self.projections / 1e3:.1f} kB"
        return f"{self.total / 1e3:.1f} kB ({parts}, {rest}); (K + 1) β/32 is {self.paper / 1e3:.1f} kB"


def cascade_sizes(folder: str | Path) -> CascadeSizes:
    """Bytes of what `Cascade.save` writes, of that folder or of the one that a cascade was trained in."""
    folder = Path(folder)
    facts = files.read_json(folder / CASCADE_NAME, _FACTS)
    names = facts["adapters"]
    of_router = [ROUTER_NAME, ROUTER_TENSORS_NAME] if facts["router"] else []
    groups = of_router, [_PROJECTION_NAME], [CASCADE_NAME, *(f"{name}/{CONFIG_NAME}" for name in names)]
    router, projections, settings = (sum((folder / file).stat().st_size for file in group) for group in groups)
    sizes = [adapter_sizes(folder / name) for name in names]
    masks, statistics = sum(size.mask for size in sizes), sum(size.statistics for size in sizes)
    total = sum(size.total for size in sizes) + router + projections + settings
    return CascadeSizes(masks, statistics, router, projections, total, len(names) * facts["base_parameters"] * 4 // 32)
