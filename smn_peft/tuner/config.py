# SPDX-License-Identifier: Apache-2.0
"""`MaskConfig`: everything that can be said about a mask adapter, each option with its help text."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from peft.config import PeftConfig
from typing_extensions import Self

from ..functional.masking import MASK_TYPES, MaskSpec
from ..storage import (
    CODECS,
    CONFIG_NAME,
    FORMAT_VERSION,
    PICKLE_NAME,
    SAVE_DTYPES,
    WEIGHTS_NAME,
    atomic_write,
    check_folder_weights,
    check_format_version,
    check_hub_weights,
    finish_adapter_file,
)
from ._compat import SMN
from .validation import MAX_SAVED, check_names, check_pattern, check_preprocessing, class_names

__all__ = ["MaskConfig"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of a mask adapter: which frozen weights get a learned bit, and how it is learned.

    The defaults are the paper's (Self-Masking Networks, GCPR 2024): one score per weight starting at 1, active where
    the score is above 0, the masked weight divided by σ. The one exception is `batch_norm`: the paper re-estimates
    the statistics, the default keeps the base's.
    """

    target_modules: list[str] | str | None = _option(
        None,
        "Modules to mask: list of names, regex, 'all-linear', 'all-conv', or None for the architecture's default.",
    )
    exclude_modules: list[str] | str | None = _option(None, "Modules never to mask: list of names or regex.")
    layers_to_transform: list[int] | int | None = _option(None, "Indices of the layers to mask; None masks all.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list that `layers_to_transform` indexes.")
    target_parameters: list[str] | None = _option(None, "Not supported for masks; present because PEFT reads it.")
    modules_to_save: list[str] | None = _option(None, "Modules trained and saved in full, such as the new head.")
    init_weights: bool = _option(True, "False starts from a random mask of half density (for tests).")
    mask_type: Literal["threshold", "topk"] = _option("threshold", "How scores become a mask.")
    threshold: float = _option(0.0, "Threshold μ: a weight is active where its score is above it.")
    init_score: float | Literal["kaiming_uniform"] = _option(
        1.0, "Initial score of every weight, or 'kaiming_uniform' (topk, Ramanujan et al. 2020)."
    )
    density: float | None = _option(None, "Fraction of weights that stay active (mask_type='topk').")
    density_schedule: Literal["linear"] | None = _option(
        None, "'linear': go from density 1 to `density` as `update_density(progress)` says (mask_type='topk')."
    )
    rank_by: Literal["score", "absolute"] = _option(
        "score", "Rank by the score, or by its absolute value (mask_type='topk')."
    )
    scale: bool = _option(True, "Divide the masked weight by σ = sqrt(density), one σ per tensor.")
    scale_gradient: bool = _option(True, "Let the gradient flow through σ.")
    mask_bias: bool = _option(False, "Mask the biases of the target modules too.")
    mask_norms: bool = _option(
        False, "Mask every norm layer's scale too (with mask_bias its shift): an ablation that ruins a model."
    )
    trainable_fraction: float = _option(1.0, "Fraction of each tensor's weights that take part; the rest stays on.")
    select: Literal["random", "magnitude"] = _option(
        "random", "How `trainable_fraction` selects: at random (`seed`) or the largest |θ| of each tensor."
    )
    seed: int = _option(0, "Seed of everything random in the adapter: selection and random initial scores.")
    batch_norm: Literal["frozen", "adapt"] = _option(
        "frozen",
        "'frozen': the base's statistics, held while training. 'adapt': each adapter has its own, saved with it.",
    )
    save_scores: bool = _option(False, "Save the fp32 scores beside the bits, for an exact resume (32 times larger).")
    codec: str = _option(
        "bits",
        "How masks are stored: 'bits', one per weight; 'entropy', coded to about their entropy.",
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = _option(
        "float32", "Dtype that head and BatchNorm statistics are saved in; `round_extras(model)` rounds the live ones."
    )
    check_base: bool = _option(True, "Refuse a base model that is not the one the mask was learned on.")
    format_version: int = _option(FORMAT_VERSION, "Version of the adapter format.")
    base_fingerprint: str | None = _option(None, "Fingerprint of the masked base weights; filled in on saving.")
    unmasked_fingerprint: str | None = _option(
        None, "Fingerprint of what else the features depend on: unmasked weights and statistics; filled in on saving."
    )
    preprocessing: dict[str, Any] | None = _option(
        None, "Images the mask was trained on: image_size, mean, std, interpolation, crop_pct; filled in by training."
    )
    id2label: dict[int, str] | None = _option(
        None, "Names of the head's classes by index, as transformers has them; filled in by training."
    )

    def __post_init__(self) -> None:
        """Check the options against each other, before a model is touched."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = SMN
        self.being_loaded = False  # from the reading of the config until the masks are in the model
        self.expects_bits = True  # whether bits may come for an adapter that trains
        self._has_own_fingerprint = False  # one that was computed, not read from a file
        #: A saved adapter's coded masks, until they are decoded into the model
        self.awaits_blob = self.codec != "bits" and self.base_fingerprint is not None
        check_format_version(self.format_version)
        for name, allowed in (
            ("mask_type", tuple(MASK_TYPES)),
            ("density_schedule", (None, "linear")),
            ("rank_by", ("score", "absolute")),
            ("select", ("random", "magnitude")),
            ("batch_norm", ("frozen", "adapt")),
            ("codec", tuple(CODECS)),
            ("save_dtype", tuple(SAVE_DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"{name} must be one of {choices}; got {getattr(self, name)!r}.")
        self._check_texts()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_layers()
        self._check_numbers()

    def _check_texts(self) -> None:
        """What a file of anybody's may bring, before PEFT matches it with modules."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(value := getattr(self, name), str):
                check_pattern(name, value)
            elif value is not None:
                check_names(name, value)
        check_names("modules_to_save", self.modules_to_save or (), MAX_SAVED)
        if self.id2label is not None:
            self.id2label = class_names(self.id2label)
        if self.preprocessing is not None:
            self.preprocessing = check_preprocessing(self.preprocessing)

    def _check_layers(self) -> None:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: pass the indices too.")
        regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-conv"
        if self.layers_to_transform is not None and regex:
            raise ValueError(
                "layers_to_transform works with a list of target_modules only, not with "
                f"target_modules={self.target_modules!r}: pass the list, or put the indices into the regex."
            )
        if self.layers_to_transform is not None and self.mask_norms:
            raise ValueError("mask_norms masks the norms of all layers: leave layers_to_transform out.")
        if self.target_parameters:
            raise ValueError("target_parameters is not supported for masks: name the modules in target_modules.")

    def _check_numbers(self) -> None:
        if isinstance(self.init_score, str):
            if self.init_score != "kaiming_uniform":
                raise ValueError(f"init_score must be a number or 'kaiming_uniform'; got {self.init_score!r}.")
        elif self.mask_type == "threshold" and self.init_score == self.threshold:
            raise ValueError(
                f"init_score equals threshold ({self.threshold}): every weight would start switched off, a tie is off."
            )
        if not 0.0 < self.trainable_fraction <= 1.0:
            raise ValueError(f"trainable_fraction must lie in (0, 1]; got {self.trainable_fraction}.")
        if self.mask_type == "topk":
            if self.density is None or not 0.0 < self.density <= 1.0:
                raise ValueError(f"mask_type='topk' needs density in (0, 1]; got {self.density}.")
        elif self.density is not None or self.density_schedule is not None:
            raise ValueError("density and density_schedule belong to mask_type='topk'; 'threshold' finds its density.")

    def for_model(self, *, native: bool) -> Self:
        """A copy for one model, which may write to it; of this object the caller stays the owner.

        Args:
            native: Whether a loader may write to the model without `PeftModel`, as transformers' own does.
        """
        result = copy.copy(self)
        for option in fields(self):
            if isinstance(value := getattr(self, option.name), (list, set, dict)):
                setattr(result, option.name, copy.copy(value))
        if self._has_own_fingerprint and not self.being_loaded:  # another model's config, for a fresh adapter
            result.base_fingerprint = result.unmasked_fingerprint = None
        result._has_own_fingerprint = False
        result.expects_bits = native or self.being_loaded or result.base_fingerprint is not None
        return result

    def take_fingerprints(self, masked: str | None, unmasked: str | None) -> None:
        """Keep the fingerprints of the base that the adapter is on, for saving; None leaves what is known.

        An adapter that was saved without the second one was not compared by it, and does not get it in saving again.
        """
        came_without = not self._has_own_fingerprint and self.base_fingerprint and not self.unmasked_fingerprint
        if masked is not None:
            self.base_fingerprint = masked
            if unmasked is not None and not came_without:
                self.unmasked_fingerprint, self._has_own_fingerprint = unmasked, True

    def mask_spec(self) -> MaskSpec:
        """The part of the configuration that the maths needs, at the start of training."""
        start = 1.0 if self.density_schedule else (self.density if self.density is not None else 1.0)
        return MaskSpec(
            mask_type=self.mask_type,
            threshold=self.threshold,
            density=start,
            absolute=self.rank_by == "absolute",
            scale=self.scale,
            scale_gradient=self.scale_gradient,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """As PEFT's; the adapter's file is checked before any model is touched, and a pickle is refused."""
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        check_folder_weights(folder)
        config: Self = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not os.path.isdir(folder):
            check_hub_weights(pretrained_model_name_or_path, subfolder, **PeftConfig._split_kwargs(kwargs)[0])
        config.being_loaded = True
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-compatible values; sets become sorted lists, so that files are reproducible."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; the old file stays whole until the new one is.

        A coded or rounded adapter's file, which PEFT writes before it calls this, is finished: see
        [`finish_adapter_file`].

        Args:
            save_directory: Folder, created if it does not exist.
            kwargs: `auto_mapping_dict`, as PEFT passes it.
        """
        pickled, weights = (os.path.join(save_directory, name) for name in (PICKLE_NAME, WEIGHTS_NAME))
        if os.path.isfile(pickled) and not os.path.isfile(weights):
            raise ValueError(
                f"{pickled} is a pickle, which is never loaded: delete it, and save without safe_serialization=False."
            )
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; save_pretrained writes into a folder.")
        os.makedirs(save_directory, exist_ok=True)
        finish_adapter_file(
            os.path.join(save_directory, WEIGHTS_NAME),
            codec=self.codec,
            save_dtype=self.save_dtype,
            base_fingerprint=self.base_fingerprint,
        )
        values = self.to_dict()
        mapping: Mapping[str, Any] | None = kwargs.pop("auto_mapping_dict", None)
        if mapping is not None:
            values["auto_mapping"] = dict(mapping)
        with atomic_write(os.path.join(save_directory, CONFIG_NAME)) as file:
            file.write(json.dumps(values, indent=2, sort_keys=True).encode())
