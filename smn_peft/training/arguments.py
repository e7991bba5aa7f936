# SPDX-License-Identifier: Apache-2.0
"""`TrainArguments`: a whole run as the command line takes it; recipes; and whether two runs have the same settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .._options import check_options, did_you_mean, from_mapping, option, read_values
from ..backbones import is_file_spec, name_read_from
from ..backbones.from_file import import_file
from ..data import MultiCropOptions, SupervisedOptions
from ..objectives import Objective, list_objectives, objective_class
from ..tuner import MaskConfig
from .adapters import WITHOUT_PEFT, check_adapt, peft_methods


@dataclass
class LoopArguments:
    """How long, how fast and in what precision to train, and what to write on the way.

    The defaults are the paper's recipe for masks (section 4.1): SGD with momentum 0.9, batches of 64, a cosine to 0.
    """

    output_dir: str = option("output", "Folder for checkpoints, metrics.jsonl and the finished adapter.")
    epochs: int = option(150, "Passes over the training images.", least=1)
    max_steps: int | None = option(None, "Optimizer steps to stop after; the schedule is made for them.", least=1)
    steps_per_epoch: int | None = option(
        None, "Optimizer steps that count as an epoch, where the loader has no length: with streaming.", least=1
    )
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulated parts.", least=1)
    accumulate: int = option(1, "Parts that each process computes its share of a batch in, to save memory.", least=1)
    lr: float = option(50.0, "Learning rate of the scores (full: of all weights); sweep it by decades.", least=0)
    head_lr: float = option(0.15, "Learning rate of all else that trains: head, projection, prototypes.", least=0)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "Optimizer; 'adamw' wants lr 0.03 to 0.1 for scores.")
    momentum: float = option(0.9, "Momentum of SGD.", least=0, below=1)
    weight_decay: float = option(0.0, "Weight decay of the scores (or weights). Scores want none.", least=0)
    head_weight_decay: float = option(0.0, "Weight decay of all else that trains.", least=0)
    warmup_epochs: float = option(0.0, "Epochs W of linear warm-up before the cosine, starting at 1/W.", least=0)
    schedule_every: Literal["step", "epoch"] = option("step", "How often the learning rate moves.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Autocast of the forward; scores stay as they are.")
    score_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Dtype of scores and their momentum; bfloat16 takes half the memory, by stochastic rounding."
    )
    save_dtype: Literal["float32", "bfloat16", "float16", "int8"] = option(
        "float32",
        "Dtype that what trained beside a mask is saved in, and is rounded to before the last evaluation; int8, with "
        "a scale per class, is of a mask's head.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward, to save memory.")
    channels_last: bool = option(False, "Keep images and convolution weights with channels last (GPU).")
    compile: bool = option(False, "Run the model's forward through torch.compile.")
    sync_batch_norm: bool = option(True, "With several processes, normalise by the whole batch, as one process would.")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.")
    seed: int = option(0, "Seed of weights, order and augmentation.", least=0, below=2**32)
    log_every: int = option(10, "Optimizer steps between two lines of metrics.jsonl.", least=1)
    checkpoint_every: int | None = option(None, "Optimizer steps between checkpoints; None: once per epoch.", least=1)
    keep_checkpoints: int = option(1, "Newest checkpoints to keep; 0 writes none.")
    evaluate_every: int | None = option(None, "Epochs between evaluations; None: only before and after.", least=1)
    log_with: str | None = option(None, "An accelerate tracker beside metrics.jsonl, such as 'tensorboard', 'wandb'.")
    resume: bool = option(False, "Go on from the newest checkpoint in output_dir, exactly where it was.")

    def __post_init__(self) -> None:
        check_options(self)


# Options that take all training images at once, which a stream does not give.
_OF_ALL_IMAGES = frozenset(
    "eval_fraction limit class_limit fraction keep_best indices_file cache_images bound".split()
)


@dataclass
class TrainArguments(LoopArguments):
    """What to adapt, on which images, to which objective; the loop's own arguments are inherited."""

    backbone: str = option("", "Hub id, timm name, folder, or your own file.py:function that returns a model.")
    weights: str | None = option(None, "A safetensors file with weights for the timm architecture `backbone`.")
    pretrained: bool = option(True, "False starts from random weights, which is good for tests only.")
    backbone_revision: str | None = option(None, "Git revision of the backbone on the Hub.")
    base_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Dtype of the frozen weights; bfloat16 halves their memory. BatchNorm stays float32."
    )
    image_size: int | None = option(None, "Side of the images in pixels; None: the backbone's.", least=1, most=4096)
    init_from: str | None = option(None, "Start from the scores, head and statistics of the run in this folder.")
    adapt: str = option(
        "mask",
        "What trains beside the head: a mask; all weights ('full'); every bias ('bias'); nothing ('head'); BatchNorm "
        "statistics ('statistics'); or a method of PEFT on the layers of `mask`, by its name: 'lora', 'ia3' ….",
    )
    peft: dict[str, Any] = option({}, "Options of that method of PEFT as key=value, such as r=4: its config's fields.")
    mask: MaskConfig = option(MaskConfig, "The mask adapter.")
    mask_stages: int | None = option(None, "Number of first stages, or blocks without stages, to mask.", least=1)

    dataset: str = option("", "Name of a known dataset, Hub id, image folder, parquet or npz file.")
    dataset_revision: str | None = option(None, "Git revision of the dataset on the Hub.")
    image_column: str | None = option(None, "Column of the images, if the dataset does not say.")
    label_column: str | None = option(None, "Column of the labels, if the dataset does not say.")
    streaming: bool = option(
        False,
        "Read the images in order from where they are, without a copy: a Hub id, parquet files or tars of webdataset.",
    )
    shuffle_buffer: int = option(1000, "Images of a stream that each worker holds to shuffle them.", least=1)
    num_classes: int | None = option(None, "Number of classes, for a stream that does not say.", least=2)
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option("test", "Split to evaluate on; None: do not evaluate.")
    eval_fraction: float | None = option(
        None,
        "Evaluate on this part of train_split, evenly of every class, and train on the rest.",
        above=0,
        below=1,
    )
    eval_limit: int | None = option(None, "Evaluate on a seeded choice of this many images of eval_split.", least=1)
    knn_limit: int | None = option(None, "k-NN votes with at most this many labelled training images.", least=1)
    knn_k: int = option(200, "Neighbours of the k-NN evaluation; all where there are fewer.", least=1)
    eval_probe: bool = option(False, "Fit a linear probe too whenever k-NN is evaluated.")
    limit: int | None = option(None, "Train on a seeded choice of this many images.", least=1)
    class_limit: int | None = option(None, "Train and evaluate on the first so many classes only.", least=1)
    fraction: float = option(1.0, "Train on this fraction of the images (after limit).", above=0, most=1)
    balanced: bool = option(True, "Take the fraction evenly from the classes, where labels are known.")
    subset_seed: int = option(0, "Seed of the limits, so that runs with other seeds see the same images.")
    fraction_seed: int = option(0, "Seed of the fraction; with one seed a smaller part lies in a larger one.")
    keep_best: float | None = option(
        None,
        "End in the state that was best on this part of the training images, held out evenly of every class: at the "
        "start, at the end, or where evaluate_every says.",
        above=0,
        below=1,
    )
    indices_file: str | None = option(None, "A .npy of numbers of images to train on, of what the limits leave.")
    num_workers: int = option(0, "Processes that load and augment images; 0: the training process itself.", least=0)
    cache_images: bool = option(False, "Hold decoded images in memory, up to 2 GiB.")
    supervised: SupervisedOptions = option(SupervisedOptions, "Augmentation of objectives with one view per image.")
    multi_crop: MultiCropOptions = option(MultiCropOptions, "Augmentation of objectives with several views per image.")

    objective: str = option("cross_entropy", "cross_entropy, zero_shot, swav, infonce, or your own file.py:name.")
    objective_options: dict[str, Any] = option({}, "Options of the objective, as key=value.")
    head: Literal["trained", "probe", "masked"] = option(
        "trained", "Head for labels: new and trained; trained from a linear probe; or frozen, random and masked."
    )
    bound: float | None = option(
        None,
        "Keep features near those at the start, lest few labels lead astray: their squared distance, relative to "
        "their variance, counts this number / training images in the loss. 100 suits CIFAR-10. BatchNorm statistics "
        "then stay the start's.",
        least=0,
    )
    max_bytes: int | str | None = option(
        None, "Largest size of the adapter's file, in bytes or such as 40kB: the rate of the mask is found for it."
    )
    max_flops: float | None = option(
        None,
        "Largest share of the backbone's multiplications that the sliced model takes, such as 0.7; needs "
        "mask.granularity row, column or either with +weight.",
        above=0,
        most=1,
    )
    templates: list[str] = option([], "Prompts of the zero-shot head, each with one {}; none: the dataset's own.")

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded; nested options may be mappings."""
        super().__post_init__()
        for each in fields(self):
            if is_dataclass(kind := each.default_factory) and isinstance(value := getattr(self, each.name), Mapping):
                setattr(self, each.name, from_mapping(kind, value, each.name))
        if not self.backbone:
            raise ValueError("backbone is missing: name one, such as backbone='timm/resnet50.a1_in1k'.")
        for name in ("backbone", "weights", "dataset", "init_from", "indices_file", "objective"):
            if getattr(self, name):
                setattr(self, name, absolute(getattr(self, name)))
        check_adapt(self.adapt, self.peft)
        self._check_streaming()
        if self.eval_fraction is not None and self.eval_split is None:
            raise ValueError("eval_fraction holds images out to evaluate on, and eval_split=None evaluates on none.")
        if self.head == "masked" and self.adapt != "mask":
            raise ValueError("head='masked' needs adapt='mask': a frozen random head can only be masked.")
        if self.adapt == "head" and self.objective != "cross_entropy":
            raise ValueError("adapt='head' needs objective='cross_entropy': nothing else has a head to keep.")
        if self.base_dtype != "float32" and self.adapt in WITHOUT_PEFT:
            raise ValueError(
                f"base_dtype={self.base_dtype!r} is of a frozen base, and adapt={self.adapt!r} trains it."
            )
        if self.save_dtype == "int8" and self.adapt != "mask":
            raise ValueError(f"save_dtype='int8' is of the head of a mask, not of {self.adapt!r}: take 'bfloat16'.")
        if self.mask_stages is not None and self.mask.layers_to_transform is not None:
            raise ValueError("mask_stages and mask.layers_to_transform both choose layers: give one of them.")
        if self.adapt in peft_methods() and self.mask.batch_norm == "adapt":
            what = f"adapt={self.adapt!r} keeps the base's BatchNorm statistics"
            raise ValueError(f"{what}: set mask.batch_norm='frozen'.")
        if self.max_bytes is not None:
            self.max_bytes = _bytes(self.max_bytes)
            if self.adapt != "mask" or self.mask.codec != "entropy" or self.keep_best is not None:
                raise ValueError(
                    "max_bytes is of coded masks: it needs adapt='mask', mask.codec='entropy', no keep_best."
                )
            replace(self.mask, rate=self.mask.rate or 1.0)  # refuses what has no rate
        if self.max_flops is not None and (self.adapt != "mask" or {self.max_bytes, self.keep_best} != {None}):
            raise ValueError(
                "max_flops is of masks of rows or columns: it needs adapt='mask', no max_bytes, no keep_best."
            )
        if self.keep_best is not None and self.mask.density_schedule is not None:
            raise ValueError("keep_best may end in a denser mask than density_schedule asks for: give one of them.")

    def _check_streaming(self) -> None:
        """Refuse what needs all images at once, or a stream."""
        defaults = {each.name: each.default for each in fields(self)}
        changed = {name for name, default in defaults.items() if getattr(self, name) != default}
        if not self.streaming:
            if given := sorted({"steps_per_epoch", "shuffle_buffer", "num_classes"} & changed):
                raise ValueError(f"{', '.join(given)}: of a stream; pass streaming (--streaming), or leave it out.")
            return
        if given := sorted(_OF_ALL_IMAGES & changed) + ["head='probe'"] * (self.head == "probe"):
            raise ValueError(f"{', '.join(given)}: needs all images at once; leave it out, or streaming.")
        if self.steps_per_epoch is None:
            fix = "pass steps_per_epoch=N (--steps-per-epoch), such as the number of images // batch_size"
            raise ValueError(f"A stream has no length: {fix}.")
        if self.eval_split is not None and None in (self.eval_limit, self.knn_limit):
            what = "With streaming, the images to evaluate on and those that vote in k-NN are held in memory"
            raise ValueError(f"{what}: pass eval_limit and knn_limit (such as 5000 and 20000), or eval_split=None.")


def _bytes(size: int | str) -> int:
    """A number of bytes, from text such as "40kB" too."""
    from pydantic import ByteSize, TypeAdapter  # on use, as in `_options`

    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValueError:
        raise ValueError(f"max_bytes must be a size such as 40000, 40kB or 1MB; got {size!r}.") from None


def absolute(name: str) -> str:
    """Resolve the path of an existing file or folder, parquet pattern or "file.py:function"; leave other names."""
    path, _, function = name.rpartition(":") if is_file_spec(name) and not name.endswith(".py") else (name, "", "")
    start, pattern, _ = path.partition("*")
    matches = pattern and path.endswith((".parquet", ".tar")) and os.path.isdir(os.path.dirname(start) or os.curdir)
    if not (matches or os.path.exists(path)):
        return name
    return os.path.abspath(path) + (f":{function}" if function else "")


def objective_kind(arguments: TrainArguments) -> type[Objective]:
    """Class of the objective, by name or from the user's file that registers it: ``file.py:name``."""
    path, _, name = arguments.objective.rpartition(":")
    if is_file_spec(arguments.objective) and name not in list_objectives():
        import_file(path)
        if name not in list_objectives():
            raise ValueError(f"{path} registers no objective {name!r}: decorate its class with @register_objective.")
    return objective_class(name)


# --- Recipes: YAML files of arguments that carry the results to expect of them ---------------------------------------

_RECIPES = Path(__file__).parent / "recipes"
_NOTES = ("description", "source", "tuned_on", "expected")  # what a recipe holds beside arguments


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read the mapping of a recipe, notes included, or of another YAML file; raises as [`load_recipe`]."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _RECIPES / f"{name}.yaml"
        if path.stem not in (known := list_recipes()):
            hint = did_you_mean(str(name), known)
            raise ValueError(f"Unknown recipe {name!r}; there are {', '.join(known)}, or a .yaml file.{hint}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a mapping, such as 'epochs: 10'; it holds {type(content).__name__}.")
    _refuse_programs(content, name)
    return content


def _refuse_programs(content: Any, where: str | Path) -> None:
    """Refuse a base or objective that is a file, at any depth: a recipe may come from anybody."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in ("backbone", "objective") and isinstance(value, str):
            name_read_from(where, value, f"--{key}", first="take it out there, and ")
        _refuse_programs(value, where)


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe of the package by name, or a YAML file, as training arguments: as they are written, but checked.

    Raises:
        OSError: The file cannot be read.
        ValueError: For an unknown name or argument, a value of another type, or a file that is not YAML, not a
            mapping, or names a program.
    """
    content = {key: value for key, value in read_recipe(name).items() if key not in _NOTES}
    read_values(TrainArguments, content, f"Recipe {name}")
    return content  # unconverted: hashes of runs are of what is written


# --- Settings of a run as facts that JSON holds ---------------------------------------------------------------------

# What may differ between a run and its resumption, because no weight depends on it. What the last two name is compared
# by content, so that folders can be moved.
_HARMLESS = frozenset(
    "output_dir resume log_every checkpoint_every keep_checkpoints log_with evaluate_every num_workers cache_images "
    "eval_split eval_limit eval_probe knn_k knn_limit init_from indices_file".split()
)
# Digests that, where both sides know them, are compared in the place of the names of what they are of.
_CONTENT = {
    "base": ("backbone", "weights", "pretrained", "backbone_revision"),
    "data": ("dataset", "dataset_revision"),
}
_ADDED: dict[str, Any] = {
    "peft": {},
    "save_dtype": "float32",
    "base_dtype": "float32",
    "steps_per_epoch": None,
    "streaming": False,
    "shuffle_buffer": 1000,
    "num_classes": None,
}  # what runs of versions without these options did
_MEANING = {"base": "base (fingerprint of its weights)", "data": "data (digest of the training images and labels)"}


def as_facts(arguments: LoopArguments, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Convert the arguments and `more` to what JSON gives back: lists for tuples, sorted lists for sets."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    facts: dict[str, Any] = json.loads(json.dumps({**asdict(arguments), **(more or {})}, default=plain))
    return facts


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    """Raise ValueError if the facts that a run saved in file `where` differ in what could change a weight."""
    saved = {**{name: value for name, value in _ADDED.items() if name in wanted}, **saved}
    # Class names are known only where something is evaluated, digests only to a whole run.
    left_out = {name for name in ("classes", *_CONTENT) if saved.get(name) is None or wanted.get(name) is None}
    left_out |= {path for name, paths in _CONTENT.items() if name not in left_out for path in paths}
    # Which states keep_best chooses from.
    harmless = _HARMLESS - ({"evaluate_every"} if wanted.get("keep_best") is not None else set())
    names = sorted((set(saved) | set(wanted)) - harmless - left_out)
    pairs = ((_MEANING.get(name, name), saved.get(name), wanted.get(name)) for name in names)
    if differing := "".join(f"  {name}: was {was!r}, is {now!r}\n" for name, was, now in pairs if was != now):
        what = f"{where} was written by a run with other settings, so going on would not be the same run"
        raise ValueError(f"{what}:\n{differing}Resume with the old ones, or start anew in another output_dir.")
