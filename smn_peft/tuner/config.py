# SPDX-License-Identifier: Apache-2.0
"""`MaskConfig`: the options of a mask adapter, each with its help text, and the checks of values from a file."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType
from typing_extensions import Self

from .._options import check_options, option
from ..functional.masking import MaskSpec
from ..storage.adapter_config import CONFIG_NAME, FORMAT_VERSION, check_format_version
from ..storage.adapter_file import WEIGHTS_NAME
from ..storage.files import atomic_write
from ..storage.hub_files import PICKLE_NAME, check_folder_weights, check_hub_weights

MAX_NAMES = 20_000
MAX_SAVED = 128  # PEFT matches each of `modules_to_save` with every module
MAX_NAME = 1_000
MAX_PATTERN = 1_000_000
MAX_CLASSES = 100_000
Granularity = Literal["weight", "row", "column", "row+weight", "column+weight", "2:4"]
MAX_SIZE = 4096  # pixels of a side: a downloaded config decides no more memory than that


def _peft_type() -> PeftType:
    """`PeftType.SMN`, made if PEFT does not have it: PEFT looks types up by value, so a plain string will not do."""
    if "SMN" in PeftType.__members__:
        return PeftType["SMN"]
    member = str.__new__(PeftType, "SMN")
    member._name_ = member._value_ = "SMN"
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    PeftType._member_map_["SMN"] = member
    PeftType._value2member_map_["SMN"] = member
    PeftType._member_names_.append("SMN")
    type.__setattr__(PeftType, "SMN", member)
    return member


SMN = _peft_type()
"""The PEFT type of this method."""


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of a mask adapter: which frozen weights get a learned bit, and how it is learned.

    The defaults are the paper's (Self-Masking Networks, GCPR 2024): one score per weight starting at 1, active where
    the score is above 0, the masked weight divided by σ. The one exception is `batch_norm`: the paper re-estimates
    the statistics, the default keeps the base's.
    """

    target_modules: list[str] | str | None = option(
        None,
        "Modules to mask: list of names, regex, 'all-linear', 'all-conv', or None for the architecture's default.",
    )
    exclude_modules: list[str] | str | None = option(None, "Modules never to mask: list of names or regex.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to mask; None masks all.")
    layers_pattern: list[str] | str | None = option(None, "Name of the list that `layers_to_transform` indexes.")
    target_parameters: list[str] | None = option(None, "Not supported for masks; present because PEFT reads it.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved in full, such as the new head.")
    init_weights: bool = option(True, "False starts from a random mask of half density (for tests).")
    mask_type: Literal["threshold", "topk"] = option("threshold", "How scores become a mask.")
    threshold: float = option(0.0, "Threshold μ: a weight is active where its score is above it.")
    init_score: float | Literal["kaiming_uniform"] = option(
        1.0, "Initial score of every weight, or 'kaiming_uniform' (topk, Ramanujan et al. 2020)."
    )
    density: float | None = option(None, "Fraction of weights that stay active (mask_type='topk').", above=0, most=1)
    density_schedule: Literal["linear"] | None = option(
        None, "'linear': go from density 1 to `density` as `update_density(progress)` says (mask_type='topk')."
    )
    rank_by: Literal["score", "absolute"] = option(
        "score", "Rank by the score, or by its absolute value (mask_type='topk')."
    )
    granularity: Granularity = option(
        "weight",
        "What one score switches: 'weight'; 'row', all that makes one output, its bias with it; 'column', all that "
        "reads one input; 'row+weight' and 'column+weight', both; '2:4', exactly two of every four inputs' weights, "
        "the pattern of sparse tensor cores, with scores that start at init_score times the weights' sizes.",
    )
    granularity_pattern: dict[str, Granularity] | None = option(
        None, "Granularity of modules by name or regex, such as {'fc1': 'row+weight'}, as PEFT's rank_pattern."
    )
    scale: bool = option(True, "Divide the masked weight by σ = sqrt(density), one σ per tensor.")
    scale_gradient: bool = option(True, "Let the gradient flow through σ.")
    rate: float = option(
        0.0,
        "Weight of the masks' bits per weight (their entropy) in the loss, see `MaskModel.rate`: smaller files.",
        least=0,
    )
    mask_bias: bool = option(False, "Mask the biases of the target modules too.")
    trainable_fraction: float = option(
        1.0, "Fraction of each tensor's weights that take part; the rest stays on.", above=0, most=1
    )
    select: Literal["random", "magnitude"] = option(
        "random", "How `trainable_fraction` selects: at random (`seed`) or the largest |θ| of each tensor."
    )
    seed: int = option(0, "Seed of everything random in the adapter: selection and random initial scores.")
    batch_norm: Literal["frozen", "adapt"] = option(
        "frozen",
        "'frozen': the base's statistics, held while training. 'adapt': each adapter has its own, saved with it.",
    )
    save_scores: bool = option(False, "Save the fp32 scores beside the bits, for an exact resume (32 times larger).")
    codec: Literal["bits", "entropy"] = option(
        "bits", "How masks are stored: 'bits', one per weight, or 'entropy', coded to about their entropy."
    )
    save_dtype: Literal["float32", "bfloat16", "float16", "int8"] = option(
        "float32",
        "Dtype that head and BatchNorm statistics are saved in, with 'int8' a head's weights, a scale per class, and "
        "all else bfloat16; `round_extras(model)` rounds the live ones.",
    )
    check_base: bool = option(True, "Refuse a base model that is not the one the mask was learned on.")
    format_version: int = option(FORMAT_VERSION, "Version of the adapter format.")
    base_fingerprint: str | None = option(None, "Fingerprint of the masked base weights; filled in on saving.")
    unmasked_fingerprint: str | None = option(
        None, "Fingerprint of what else the features depend on: unmasked weights and statistics; filled in on saving."
    )
    preprocessing: dict[str, Any] | None = option(
        None, "Images the mask was trained on: image_size, mean, std, interpolation, crop_pct; filled in by training."
    )
    id2label: dict[int, str] | None = option(
        None, "Names of the head's classes by index, as transformers has them; filled in by training."
    )

    def __post_init__(self) -> None:
        """Check the options against each other, before a model is touched."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = SMN
        self._has_own_fingerprint = False  # computed on saving, not read from a file
        check_format_version(self.format_version)
        check_options(self)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):  # a file may bring them
            if isinstance(value := getattr(self, name), str):
                check_pattern(name, value)
            elif value is not None:
                _check_names(name, value, MAX_NAMES)
        _check_names("modules_to_save", self.modules_to_save or (), MAX_SAVED)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if self.id2label is not None:
            self.id2label = _class_names(self.id2label)
        if self.preprocessing is not None:
            self.preprocessing = check_preprocessing(self.preprocessing)
        self._check_together()

    def _check_together(self) -> None:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: pass the indices too.")
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-conv"
        if self.layers_to_transform is not None and is_regex:
            given = f"target_modules={self.target_modules!r}: pass the list, or put the indices into the regex"
            raise ValueError(f"layers_to_transform works with a list of target_modules only, not with {given}.")
        if self.target_parameters:
            raise ValueError("target_parameters is not supported for masks: name the modules in target_modules.")
        if isinstance(self.init_score, str) and self.init_score != "kaiming_uniform":
            raise ValueError(f"init_score must be a number or 'kaiming_uniform'; got {self.init_score!r}.")
        if self.mask_type == "threshold" and self.init_score == self.threshold:
            raise ValueError(f"init_score equals threshold ({self.threshold}): no weight would be on, a tie is off.")
        if self.rate and (self.mask_type != "threshold" or not self._starts_on()):
            fix = "mask_type='threshold' and init_score a number above threshold"
            raise ValueError(f"rate={self.rate:g} pulls scores back to where they started: it needs {fix}.")
        self._check_granularity()
        if self.mask_type == "topk" and self.density is None:
            raise ValueError("mask_type='topk' needs density in (0, 1]; got None.")
        if self.mask_type != "topk" and (self.density is not None or self.density_schedule is not None):
            raise ValueError("density and density_schedule belong to mask_type='topk'; 'threshold' finds its density.")

    def _check_granularity(self) -> None:
        _check_names("granularity_pattern", (self.granularity_pattern or {}).keys(), MAX_NAMES)
        if unknown := [kind for kind in self._granularities() if kind not in get_args(Granularity)]:
            raise ValueError(f"granularity must be one of {', '.join(get_args(Granularity))}; got {unknown[0]!r:.80}.")
        others = next((kind for kind in self._granularities() if kind != "weight"), None)
        if others and (self.mask_type, self.trainable_fraction, self.mask_bias) != ("threshold", 1.0, False):
            raise ValueError(f"granularity={others!r} needs mask_type, trainable_fraction and mask_bias as they are.")
        if "2:4" in self._granularities() and (self.rate or not self._starts_on()):
            raise ValueError(
                "granularity='2:4' ranks the weights of every four: leave rate and init_score as they are."
            )

    def _granularities(self) -> tuple[str, ...]:
        return (self.granularity, *(self.granularity_pattern or {}).values())

    def granularity_of(self, module_name: str) -> str:
        """What one score switches in a module, by its name: `granularity_pattern`'s first match, or `granularity`."""
        pattern = self.granularity_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), module_name), self.granularity)

    def _starts_on(self) -> bool:
        return not isinstance(self.init_score, str) and self.init_score > self.threshold

    def for_model(self) -> Self:
        """Copy the config for one model, which may write to the copy; this object stays the caller's."""
        result = copy.deepcopy(self)
        if self._has_own_fingerprint:  # another model's config, for a fresh adapter
            result.base_fingerprint = result.unmasked_fingerprint = None
        result._has_own_fingerprint = False
        return result

    @property
    def comes_from_file(self) -> bool:
        """Whether the config is a saved adapter's, whose masks are yet to be loaded."""
        return self.base_fingerprint is not None

    def take_fingerprints(self, masked: str | None, unmasked: str | None) -> None:
        """Store the fingerprints of the base for saving; None leaves what is known.

        An adapter that was saved without the second one was not compared by it, and does not get it in saving again.
        """
        was_saved_without = not self._has_own_fingerprint and self.base_fingerprint and not self.unmasked_fingerprint
        if masked is not None:
            self.base_fingerprint = masked
            if unmasked is not None and not was_saved_without:
                self.unmasked_fingerprint, self._has_own_fingerprint = unmasked, True

    def mask_spec(self, granularity: str | None = None) -> MaskSpec:
        """The part of the configuration that the maths needs, at the start of training, for a granularity."""
        return MaskSpec(
            mask_type="2:4" if (granularity or self.granularity) == "2:4" else self.mask_type,
            threshold=self.threshold,
            density=1.0 if self.density_schedule or self.density is None else self.density,
            absolute=self.rank_by == "absolute",
            scale=self.scale,
            scale_gradient=self.scale_gradient,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """Read a config; the adapter's weights are checked before any model is touched, and a pickle is refused."""
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        check_folder_weights(folder)
        config: Self = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not os.path.isdir(folder):
            check_hub_weights(pretrained_model_name_or_path, subfolder, **PeftConfig._split_kwargs(kwargs)[0])
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-compatible values; sets become sorted lists, so that files are reproducible."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` to a folder, made if need be; the old file stays whole until the new one is."""
        pickled, weights = (os.path.join(save_directory, name) for name in (PICKLE_NAME, WEIGHTS_NAME))
        if os.path.isfile(pickled) and not os.path.isfile(weights):
            raise ValueError(f"{pickled} is a pickle, which is never loaded: save without safe_serialization=False.")
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; save_pretrained writes into a folder.")
        os.makedirs(save_directory, exist_ok=True)
        values = self.to_dict()
        if (mapping := kwargs.get("auto_mapping_dict")) is not None:
            values["auto_mapping"] = dict(mapping)
        with atomic_write(os.path.join(save_directory, CONFIG_NAME)) as file:
            file.write(json.dumps(values, indent=2, sort_keys=True).encode())


# What counts as one character of a pattern: digits, however many, an escape, and a class of characters.
_COUNT = r"\{(?:[0-9]+,?|,)[0-9]*\}"
_CHARACTER = re.compile(rf"(?:\\d|\[0-9\])(?:[*+?]|{_COUNT})?[?+]?|\\.|\[\^?\]?(?:\\.|[^]\\])*\]", re.DOTALL)
_GROUP = re.compile(rf"\((?:\?(?:[aimsu]*:|[aimsu]+|<?[=!]|P<\w+>)|(?!\?))([^()]*)\)(?:([*+]|{_COUNT})[?+]?)?")
_UNLIMITED = re.compile(r"(?:[*+]|\{[0-9]*,[0-9]*\})[?+]?")


def check_pattern(option: str, pattern: str) -> None:
    """Refuse a regular expression that may take for ever on a module's name.

    Python's engine tries every way of sharing a name among the repetitions of a pattern, and cannot be stopped. Here a
    repetition such as ``.*`` costs 4, digits 0, what is optional and a choice by ``|`` 1; a group that costs anything
    may be repeated a given number of times only. With 14 in all, the worst pattern takes milliseconds for a name.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{option} is a pattern of {len(pattern):,} characters, and may have {MAX_PATTERN:,}.")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{option} is no regular expression ({error}): {pattern[:80]!r}.") from error
    text, outer = "", _CHARACTER.sub("a", pattern)
    while text != outer:  # innermost groups first; each becomes as many "?" as it costs
        text, outer = outer, _GROUP.sub(lambda group: "a" + "?" * _cost(group[1], group[2]), outer)
    if "(" in text or _cost(text) > 14:  # a group of another kind may hide anything
        raise ValueError(
            f"{option} is a pattern that may take for ever to match: {pattern[:80]!r}. Write it with three of '.*' at "
            "most and none of them repeated, or list the names."
        )


def _cost(body: str, repeated: str | None = None) -> int:
    """See [`check_pattern`]; `body` holds no group."""
    choices = [_UNLIMITED.sub("????", choice).count("?") for choice in body.split("|")]
    cost = max(choices) + (len(choices) > 1)
    count = (repeated or "1").strip("{}")
    return min(15, cost * int(count)) if count.isdigit() else 15 if cost else 4


def _check_names(option: str, names: Collection[Any], most: int) -> None:
    """Refuse a list of modules that is none, or longer than PEFT can match."""
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} must hold names of modules; got {next(n for n in names if type(n) is not str)!r}.")
    if len(names) > most:
        raise ValueError(f"{option} has {len(names):,} names, and may have {most:,}: name the modules they lie in.")
    for name in names:
        if not 0 < len(name) <= MAX_NAME:
            raise ValueError(f"{option} has a name of {len(name):,} characters; it may have 1 to {MAX_NAME:,}.")
        if re.fullmatch(r"[\w.-]+", name) is None:  # PEFT matches some lists as patterns
            check_pattern(option, name)


def _class_names(id2label: Any) -> dict[int, str]:
    """Names of classes by index, in their order; JSON has the indices as texts."""
    if not isinstance(id2label, Mapping) or len(id2label) > MAX_CLASSES:
        raise ValueError(f"id2label must map up to {MAX_CLASSES:,} indices to names; got {id2label!r:.80}.")
    result: dict[int, str] = {}
    for key, name in id2label.items():
        index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(index) is not int or index < 0 or index in result:
            raise ValueError(f"id2label must have the indices of classes as its keys, each once; got {key!r:.80}.")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError(f"id2label must have names of up to {MAX_NAME:,} characters; got {name!r:.80}.")
        result[index] = name
    return dict(sorted(result.items()))


def check_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """Check how images are prepared, which may come from anybody's file; returns all five values, as JSON has them.

    `image_size` is in pixels; `mean` and `std` are of images in [0, 1]; `interpolation` ("bicubic") and `crop_pct`
    (1), the part of the resized shorter side that is kept, may be missing.
    """
    if not isinstance(preprocessing, Mapping):
        raise ValueError(f"preprocessing must be a mapping such as {{'image_size': 224}}; got {preprocessing!r:.80}.")
    known = {"interpolation": "bicubic", "crop_pct": 1.0, **preprocessing}
    size = known.get("image_size")
    checks = {
        "image_size": (type(size) is int and 1 <= size <= MAX_SIZE, f"a number of pixels from 1 to {MAX_SIZE}"),
        # Beyond these bounds fp32 holds infinity, or near enough.
        "mean": (_is_triple(known.get("mean"), -1e6), "three numbers between -1e+06 and 1e6, one per channel"),
        "std": (_is_triple(known.get("std"), 1e-6), "three numbers between 1e-06 and 1e6, one per channel"),
        "interpolation": (known["interpolation"] in ("bicubic", "bilinear"), "one of bicubic, bilinear"),
        "crop_pct": (_is_within(known["crop_pct"], 0.5, 1), "a number from 0.5 to 1"),
    }
    if strange := known.keys() - checks.keys():
        raise ValueError(f"preprocessing: {strange.pop()!r:.80} is unknown; it has {', '.join(checks)}.")
    for name, (is_usable, wanted) in checks.items():
        if not is_usable:
            got = f"it is {known[name]!r:.80}" if name in known else "it is missing"
            raise ValueError(f"preprocessing: {name} must be {wanted}; {got}. Correct it in the adapter's config.")
    numbers = {name: [float(value) for value in known[name]] for name in ("mean", "std")}
    return {**known, **numbers, "crop_pct": float(known["crop_pct"])}


def _is_triple(value: Any, least: float) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(_is_within(number, least, 1e6) for number in value)


def _is_within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
