# SPDX-License-Identifier: Apache-2.0
"""From arguments to parts: images, base model under its adapter, objective, loader and evaluation, checked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import (
    Backbone,
    Classifier,
    accept_size,
    is_file_spec,
    load_backbone,
    load_classifier,
    load_from_file,
    pooled_features,
)
from ..backbones.clip import templates_for, text_embeddings
from ..data import (
    ImageDataset,
    ImageStream,
    MultiCropOptions,
    NoLabelsError,
    NoSplitError,
    build_loader,
    build_stream_loader,
    held_out,
    label_subset,
    load_images,
    multi_crop_transform,
    preprocessing_transform,
    stream_images,
    supervised_transform,
)
from ..evaluation import (
    PAPER_DECAY,
    Features,
    evaluate_accuracy,
    evaluate_knn,
    extract_features,
    fit_linear_probe,
    linear_probe,
)
from ..objectives import Objective, create_objective
from ..storage.files import check_regular
from ..storage.fingerprint import fingerprint, tensor_digest
from ..tuner import MaskConfig
from ..tuner.batch_norm import has_statistics
from ..tuner.targets import resolve_targets, stage_targets
from .adapters import WITHOUT_PEFT, peft_config, select_trainable
from .arguments import TrainArguments, objective_kind
from .budget import BytesBudget, FlopsBudget
from .checkpoint import latest_checkpoint, start_from
from .processes import decided
from .task import TrainingTask

_HELD_OUT = 0.2  # share of the training images, where there is no other split to evaluate on
METRICS = ("knn", "linear_probe", "accuracy")


@dataclass(frozen=True)
class Images:
    """The images of a run: to train on, and, where labels are known, to vote in k-NN and to be tested on."""

    train: Any  # ImageDataset, or the ImageStream of `streaming`
    bank: ImageDataset | None
    test: ImageDataset | None
    held: ImageDataset | None = None  # of the labelled images, to choose the best state on
    num_classes: int | None = None  # of the whole training split, of which `train` may lack some
    classes: list[str] | None = None  # their names


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned classifier, the arguments that name its base, and what it was trained on, as far as is known."""

    model: Classifier
    base: dict[str, Any]
    dataset: str = ""
    classes: list[str] | None = None


def images_of_run(arguments: TrainArguments) -> tuple[TrainArguments, Images]:
    """Open the images; with a warning, evaluate on the validation split if there is no "test", on none without labels.

    The arguments are returned with the split that was taken.
    """
    try:
        return arguments, build_images(arguments)
    except NoSplitError as error:
        other = next((name for name in error.there if name.lower() in ("validation", "valid", "val")), None)
        if arguments.eval_split != "test" or other is None:
            raise
        found = images_of_run(replace(arguments, eval_split=other))
        warnings.warn(f"{arguments.dataset} has no split 'test': {other!r} is evaluated on.", stacklevel=3)
        return found
    except NoLabelsError as error:
        if objective_kind(arguments).needs_labels or arguments.eval_split is None or arguments.keep_best:
            raise
        reason = str(error).partition(": ")[0]
        warnings.warn(f"{reason}: nothing is evaluated, as with --eval-split none.", stacklevel=3)
    arguments = replace(arguments, eval_split=None, eval_fraction=None)
    return arguments, build_images(arguments)


def build_images(arguments: TrainArguments) -> Images:
    """Open the dataset and choose the subsets that the arguments ask for; NoLabelsError if labels are missing."""
    if arguments.streaming:
        return _streamed_images(arguments)
    needs_labels, seed = objective_kind(arguments).needs_labels, arguments.subset_seed
    labelled = needs_labels or arguments.eval_split is not None or arguments.keep_best is not None
    names = ("dataset", "image_column", "label_column", "dataset_revision", "class_limit", "eval_fraction")
    key = (*(getattr(arguments, name) for name in names), labelled, seed)
    train = full = _load(arguments, arguments.train_split, labelled)
    test, fraction = None, arguments.eval_fraction
    if arguments.eval_split is not None and fraction is None:
        test = _test_split(arguments)
        fraction = _HELD_OUT if test is None else None
    if fraction is not None:
        train, test = _without(full, fraction, seed)
    train = _limited(train, arguments.limit, seed)
    if arguments.cache_images:  # not before: decoding all images for a small part can take longer than training
        train = _cached("train", (*key, arguments.train_split, arguments.limit), train)
    bank = train
    if arguments.fraction < 1.0:
        labels = torch.zeros(len(train), dtype=torch.int64) if train.labels is None else train.labels
        options: dict[str, Any] = {"balanced": arguments.balanced, "seed": arguments.fraction_seed}
        train = train.subset(label_subset(labels, fraction=arguments.fraction, **options))
    if arguments.indices_file is not None:
        train = train.subset(read_indices(arguments.indices_file, len(train)))
    best: ImageDataset | None = None
    if arguments.keep_best is not None:
        train, best = _without(train, arguments.keep_best, seed)
    if needs_labels and train.labels is not None and len(train.labels.unique()) < 2:
        what = f"{arguments.dataset} ({arguments.train_split}): the {len(train)} training images"
        raise ValueError(f"{what} are all of one class: take another split, or more images.")
    if test is None:
        return Images(train, None, None, best, full.num_classes, full.classes)
    test = _limited(test, arguments.eval_limit, seed)
    if arguments.cache_images:
        test = _cached("test", (*key, arguments.eval_split, arguments.eval_limit), test)
    bank = _limited(bank, arguments.knn_limit, seed)
    return Images(train, bank, test, best, full.num_classes, full.classes)


def _streamed_images(arguments: TrainArguments) -> Images:
    """Open the training images as a stream, and take bounded parts of it and of `eval_split` to evaluate."""
    labelled = objective_kind(arguments).needs_labels or arguments.eval_split is not None
    train: ImageStream = _load(arguments, arguments.train_split, labelled)
    if arguments.num_classes is not None and train.label_column is not None:
        if train.classes is not None and len(train.classes) != arguments.num_classes:
            what = f"{train.name} names {len(train.classes)} classes"
            raise ValueError(f"{what}, and num_classes={arguments.num_classes}: leave that out.")
        train = replace(train, num_classes=arguments.num_classes)
    if objective_kind(arguments).needs_labels and train.num_classes is None:
        what = f"{train.name} does not say how many classes its column {train.label_column!r} has"
        raise ValueError(f"{what}: pass num_classes (--num-classes).")
    if arguments.eval_split is None:
        return Images(train, None, None, None, train.num_classes, train.classes)
    try:
        test: ImageStream = _load(arguments, arguments.eval_split, True)
    except NoSplitError as error:
        raise NoSplitError(f"{error} Name another to evaluate on, or pass --eval-split none.", error.there) from error
    test, seed = replace(test, num_classes=train.num_classes), arguments.subset_seed
    assert arguments.eval_limit is not None
    assert arguments.knn_limit is not None
    bank, tested = train.first(arguments.knn_limit, seed=seed), test.first(arguments.eval_limit, seed=seed)
    return Images(train, bank, tested, None, train.num_classes, train.classes)


def _test_split(arguments: TrainArguments) -> ImageDataset | None:
    """Open `eval_split`; None, with a warning, for the default "test" of a dataset that has but the training split."""
    try:
        return _load(arguments, str(arguments.eval_split), True)
    except NoLabelsError:
        raise
    except ValueError as error:
        there = error.there if isinstance(error, NoSplitError) else None
        if there is not None and arguments.eval_split == "test" and {*there} == {arguments.train_split}:
            held = f"{_HELD_OUT:.0%} of its images, evenly of every class, are held out and evaluated on"
            warnings.warn(f"{arguments.dataset} has no split 'test': {held} (--eval-fraction).", stacklevel=3)
            return None
        fix = "name another; hold images of the training split out, by --eval-fraction 0.2; or pass --eval-split none"
        text = f"{error} It was opened to evaluate on: {fix}."
        raise (ValueError(text) if there is None else NoSplitError(text, there)) from error


def _load(arguments: TrainArguments, split: str, labelled: bool) -> Any:
    """Open a split: an ImageStream with `streaming`, else an ImageDataset."""
    if not arguments.dataset:
        raise ValueError("dataset is missing: name one, such as dataset='cifar10'.")
    options: dict[str, Any] = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    options |= {"revision": arguments.dataset_revision, "labelled": labelled or arguments.class_limit is not None}
    try:
        found = (stream_images if arguments.streaming else load_images)(arguments.dataset, split, **options)
    except NoLabelsError as error:
        raise NoLabelsError(f"{error} In training: an objective such as swav, and --eval-split none.") from error
    return found if arguments.class_limit is None else found.first_classes(arguments.class_limit)  # type: ignore


def _without(images: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """The images but for a seeded fraction of every class, and those."""
    assert images.labels is not None  # whoever holds some out has asked for them
    chosen = held_out(images.labels, fraction, seed=seed)
    rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, chosen, False).nonzero().flatten()
    return images.subset(rest), images.subset(chosen)


def _limited(images: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    """A seeded choice of `limit` images, in their order."""
    if limit is None or limit >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(sorted(order[:limit].tolist()))


def read_indices(path: str | Path, count: int) -> Tensor:
    """Read image numbers, int64 (n,), from a ``.npy`` file of distinct integers from 0 to `count` − 1."""
    try:
        check_regular(path)
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"indices_file={path} does not exist.") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"indices_file={path} is not a .npy file of integers: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        shown = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"indices_file={path} must hold one row of integers, one at least; it holds {shown}.")
    if found.min() < 0 or found.max() >= count or len(np.unique(found)) < len(found):
        held = f"it holds {len(found)} from {found.min()} to {found.max()}"
        raise ValueError(f"indices_file={path} must hold each number once, from 0 to {count - 1}; {held}.")
    return torch.from_numpy(found.astype(np.int64))


# --- What successive runs of a process share -------------------------------------------------------------------------

_SHARED: ContextVar[dict[str, tuple[Hashable, ImageDataset]]] = ContextVar("what runs share")


@contextmanager
def share() -> Iterator[None]:
    """Keep decoded images, and so the frozen base's features of them, from one run to the next in this context."""
    token = _SHARED.set(_SHARED.get({}))
    try:
        yield
    finally:
        _SHARED.reset(token)


def _cached(purpose: str, key: Hashable, images: ImageDataset) -> ImageDataset:
    """The images decoded; inside [`share`], those that were last for this purpose if they were of the same key."""
    held = _SHARED.get({})
    if purpose not in held or held[purpose][0] != key:
        held.pop(purpose, None)  # free its memory first
        held[purpose] = key, images.cached()
    return held[purpose][1]


_FEATURES: WeakKeyDictionary[ImageDataset, tuple[Hashable, Features]] = WeakKeyDictionary()


def base_features(arguments: TrainArguments, images: ImageDataset, extract: Callable[[], Features]) -> Features:
    """Features of the frozen base by `extract`, or those that it gave last for the same base and the same images."""
    names = ("backbone", "weights", "pretrained", "backbone_revision", "base_dtype", "image_size", "batch_size")
    # A zero-shot run's features are projected; weights that no file gives are drawn from the seed.
    base = (
        *(getattr(arguments, name) for name in (*names, "channels_last")),
        arguments.objective == "zero_shot",
        arguments.seed,
    )
    known = _FEATURES.get(images)
    if known is None or known[0] != base:
        known = _FEATURES[images] = base, extract()
    return known[1]


# --- Model, objective, loader and evaluation -------------------------------------------------------------------------


def cast_base(model: nn.Module, dtype: str) -> None:
    """Cast a base's weights to bfloat16, but for BatchNorm, whose statistics a mask may adapt in small steps."""
    if dtype == "bfloat16":
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.bfloat16()


def load_base(arguments: TrainArguments, num_classes: int | None = None) -> Backbone:
    """Load the frozen base that the arguments name, with a head for `num_classes` or without one."""
    # Weights that no file gives are the run's own: the same in every process, on resuming and when it is loaded again.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        if is_file_spec(arguments.backbone):
            backbone = load_from_file(arguments.backbone)
            if arguments.image_size is not None:
                backbone = replace(backbone, image_size=arguments.image_size)
        else:
            backbone = load_backbone(
                arguments.backbone,
                pretrained=arguments.pretrained,
                image_size=arguments.image_size,
                state_dict=arguments.weights,
                revision=arguments.backbone_revision,
                projection=arguments.objective == "zero_shot",
            )
    cast_base(backbone.model, arguments.base_dtype)
    return backbone if num_classes is None else load_classifier(backbone, num_classes, head_seed=arguments.seed)


def build_task(
    arguments: TrainArguments, images: Images, device: torch.device | str = "cpu", teacher: FineTuned | None = None
) -> tuple[TrainingTask, Backbone]:
    """Build the model under its adapter (or bare, for the baselines) and the objective; head='probe' uses `device`.

    A `teacher` is the model that is distilled; the head starts as its head.
    """
    kind = objective_kind(arguments)
    num_classes = images.num_classes if kind.consumes == "logits" else None
    backbone = load_base(arguments, num_classes)
    # Of all that the base's features depend on, before anything changes it.
    base = model_digest(getattr(backbone.model, "backbone", backbone.model))
    if kind.views == "crops":
        _accept_crops(arguments.multi_crop, backbone)
    probed = arguments.head == "probe" and num_classes is not None
    if probed:
        backbone.model.to(device)
        _start_from_probe(backbone.model, backbone, images, arguments)
    if teacher is not None:
        backbone.model.head.load_state_dict(teacher.model.head.state_dict())  # type: ignore[union-attr]
    model = adapted(arguments, backbone, images.classes)
    torch.manual_seed(arguments.seed)
    objective = build_objective(arguments, backbone, num_classes, images.classes, teacher)
    statistics = {"statistics": True, "bias": False}.get(arguments.adapt)
    task = TrainingTask(model, objective, adapt_statistics=statistics, base=base)
    if arguments.max_bytes is not None:
        task.budget = BytesBudget(model, int(arguments.max_bytes))
    elif arguments.max_flops is not None:
        images_of_zeros = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
        task.budget = FlopsBudget(model, arguments.max_flops, images_of_zeros)
    if arguments.init_from is not None and not start_from(task, arguments.init_from) and probed:
        _start_from_probe(model.to(device), backbone, images, arguments)
    if arguments.bound is not None:
        options: dict[str, Any] = {"transform": evaluation_of(backbone), "batch_size": arguments.batch_size}
        task.set_bound(arguments.bound, extract_features(model.to(device), images.train, **options).features)
    return task, backbone


def model_digest(model: nn.Module) -> str:
    """Fingerprint of all of a model's tensors."""
    state = model.state_dict()
    first = next((tensor.dtype for tensor in state.values()), torch.float32)
    return fingerprint((tensor_digest(tensor) for tensor in state.values()), first)


def adapted(arguments: TrainArguments, backbone: Backbone, classes: list[str] | None) -> nn.Module:
    """Prepare a loaded model for training as `arguments.adapt` says; a head trains unless it is masked.

    Raises:
        ValueError: The method cannot take the layers, or there is nothing of what it trains.
    """
    model: Any = backbone.model
    has_head = isinstance(model, Classifier)
    if arguments.adapt in WITHOUT_PEFT:
        if arguments.adapt == "statistics" and not any(has_statistics(module) for module in model.modules()):
            raise ValueError(f"adapt='statistics' needs BatchNorm, and {arguments.backbone} has none.")
        return select_trainable(model, arguments.adapt)
    config: MaskConfig = copy.deepcopy(arguments.mask)
    # For users of the adapter, who may have its two files only.
    config.preprocessing = backbone.preprocessing
    config.id2label = dict(enumerate(classes)) if has_head and classes is not None else None
    config.seed = config.seed or arguments.seed
    if arguments.save_dtype != "float32":
        config.save_dtype = arguments.save_dtype
    if arguments.mask_stages is not None:
        config.target_modules = stage_targets(model, config.target_modules, arguments.mask_stages)
    if has_head and arguments.head == "masked":
        targets = resolve_targets(model, config.target_modules)
        if isinstance(targets, str):
            raise ValueError("head='masked' adds the head to mask.target_modules: give those as a list, or None.")
        config.target_modules = [*targets, "head"]
    elif has_head:
        config.modules_to_save = [*(config.modules_to_save or []), "head"]
    if arguments.adapt == "mask":
        return get_peft_model(model, config)
    torch.manual_seed(arguments.seed)  # PEFT draws the first weights from the global stream
    try:
        before = _features_of_noise(model, backbone.image_size)
        model = get_peft_model(model, peft_config(model, arguments.adapt, config, arguments.peft))
        after = _features_of_noise(model, backbone.image_size)  # a method may fail only here
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # PEFT's, of many kinds
        what = f"adapt={arguments.adapt!r} cannot adapt {arguments.backbone}: {' '.join(str(error).split())}"
        fix = "Set options of the method by peft, other layers by mask.target_modules, or take another method."
        raise ValueError(f"{what.rstrip('.')}. {fix}") from error
    if (change := float((after - before).norm() / before.norm())) > 1e-3:
        text = f"adapt={arguments.adapt!r} changes the features by {change:.2g} of their size before it is trained"
        warnings.warn(f"{text}: it does not start from {arguments.backbone}.", stacklevel=2)
    return model


@torch.no_grad()
def _features_of_noise(model: nn.Module, size: int) -> torch.Tensor:
    """Features (2, dim) in eval mode of two images of noise, which draw nothing from the global stream."""
    device = next(model.parameters()).device
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    found = pooled_features(model.eval(), noise).float()
    model.train(training)
    return found


def build_objective(
    arguments: TrainArguments,
    backbone: Backbone,
    num_classes: int | None,
    classes: list[str] | None,
    teacher: FineTuned | None = None,
) -> Objective:
    """Create the objective; zero-shot gets the embeddings of the class names, distillation the teacher."""
    extra: dict[str, Any] = {} if teacher is None else {"teacher": teacher.model}
    if arguments.objective == "zero_shot":
        if not classes:
            raise ValueError(f"objective='zero_shot' needs class names, and {arguments.dataset} has none.")
        templates = arguments.templates or templates_for(arguments.dataset)
        revision = arguments.backbone_revision
        embeddings, scale = text_embeddings(arguments.backbone, classes, templates, revision=revision)
        extra, num_classes = {"class_embeddings": embeddings, "logit_scale": scale}, len(classes)
    name, options = objective_kind(arguments).name, dict(arguments.objective_options)
    return create_objective(name, feature_dim=backbone.feature_dim, num_classes=num_classes, options=options, **extra)


def _accept_crops(crops: MultiCropOptions, backbone: Backbone) -> None:
    """Refuse sizes of crops that do not fit, and let the backbone take local crops beside its own size."""
    size = backbone.image_size
    if crops.global_size not in (size, MultiCropOptions().global_size):
        fix = f"set image_size={crops.global_size}, or leave it out"
        raise ValueError(f"multi_crop.global_size={crops.global_size} is not the image size, {size}: {fix}.")
    if not crops.local_crops:
        return
    if crops.local_size >= size:
        fix = "the paper has 96 to 224. Or set multi_crop.local_crops=0."
        raise ValueError(f"multi_crop.local_size={crops.local_size} must be below the image size, {size}: {fix}")
    try:
        accept_size(backbone, crops.local_size)
    except ValueError as error:
        raise ValueError(f"{error}. Set another multi_crop.local_size, or multi_crop.local_crops=0.") from error


def _start_from_probe(model: Any, backbone: Backbone, images: Images, arguments: TrainArguments) -> None:
    """Initialise the head with a linear probe on the features of the training images, the base's or an adapter's."""
    classifier: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    assert images.train.labels is not None
    counts = torch.bincount(images.train.labels, minlength=classifier.num_classes)
    if (present := int((counts > 0).sum())) < classifier.num_classes:
        found = f"the training images have {present} of {classifier.num_classes} classes"
        raise ValueError(f"head='probe' needs all: {found}. Take more of them, or head='trained'.")
    options: dict[str, Any] = {"decays": [PAPER_DECAY]} if int(counts.max()) == 1 else {}  # none left to choose on
    size, transform = arguments.batch_size, evaluation_of(backbone)
    extract = partial(extract_features, model, images.train, transform, batch_size=size)
    features = extract() if isinstance(model, PeftModel) else base_features(arguments, images.train, extract)
    probe = fit_linear_probe(features, standardise=True, cautious=True, seed=arguments.subset_seed, **options)
    classifier.set_head(probe.weight, probe.bias, probe.mean, probe.std)


def evaluation_of(backbone: Backbone) -> Any:
    """Transform of images for evaluation: as the backbone's preprocessing says, without randomness."""
    return preprocessing_transform(backbone.preprocessing)


def build_train_loader(
    arguments: TrainArguments, images: Images, backbone: Backbone, num_processes: int, process_index: int
) -> Any:
    """Build the loader of augmented batches, of which each process gets its share."""
    parts = num_processes * arguments.accumulate
    if arguments.batch_size % parts:
        split = f"{num_processes} processes × {arguments.accumulate} accumulated parts: take a multiple of {parts}"
        raise ValueError(f"batch_size={arguments.batch_size} does not divide into {split}.")
    size, mean, std = backbone.image_size, backbone.mean, backbone.std
    if objective_kind(arguments).views == "one":
        transform = supervised_transform(size, mean, std, arguments.supervised)
    else:
        transform = multi_crop_transform(mean, std, arguments.multi_crop, global_size=size)
    common: dict[str, Any] = {
        "batch_size": arguments.batch_size // arguments.accumulate,
        "seed": arguments.seed,
        "num_workers": arguments.num_workers,
        "num_processes": num_processes,
        "process_index": process_index,
        "pin_memory": not arguments.cpu and torch.cuda.is_available(),
    }
    if not arguments.streaming:
        return build_loader(images.train, transform, **common)
    assert arguments.steps_per_epoch is not None
    common |= {"batches": arguments.steps_per_epoch * arguments.accumulate, "buffer_size": arguments.shuffle_buffer}
    needed = images.train if objective_kind(arguments).needs_labels else images.train.without_labels()
    return build_stream_loader(needed, transform, **common)


def measure(
    metrics: Iterable[str], train: Features, test: Features, arguments: TrainArguments, task: TrainingTask | None
) -> dict[str, float]:
    """Values of some of `METRICS`, by features to learn from and to test on; accuracy is of the task's head."""
    known: dict[str, Callable[[], float]] = {
        "knn": lambda: evaluate_knn(train, test, k=arguments.knn_k),
        "linear_probe": lambda: linear_probe(train, test, seed=arguments.subset_seed),
        "accuracy": lambda: evaluate_accuracy(Features(task.logits_of(test.features), test.labels)),  # type: ignore
    }
    return {name: known[name]() for name in metrics}


def evaluator_of(
    arguments: TrainArguments, images: Images, backbone: Backbone, accelerator: Accelerator
) -> Callable[[TrainingTask], dict[str, Any]] | None:
    """Build the function that evaluates a task on the run's images; None if there is nothing to test on.

    ``evaluation`` names images and k, so that only comparable values are compared. The first call of a run that does
    not resume is of the frozen base: a mask that does not start with all ones is switched off for it. ``held_out`` is
    what `keep_best` chooses by, always of the task as it is: accuracy with labels, else k-NN.
    """
    bank, test, held = images.bank, images.test, images.held
    if test is None and held is None:
        return None
    fresh = decided(lambda: latest_checkpoint(arguments.output_dir)) is None
    names = ("eval_split", "eval_limit", "knn_k", "knn_limit")
    evaluation = ", ".join(f"{name}={getattr(arguments, name)}" for name in names)
    loading: dict[str, Any] = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    loading |= {"transform": evaluation_of(backbone), "accelerator": accelerator}

    def extract(task: TrainingTask, part: ImageDataset) -> Features:
        return extract_features(task, part, function=task.features, **loading)

    def evaluate(task: TrainingTask) -> dict[str, Any]:
        nonlocal fresh
        first, fresh = fresh, False
        peft = isinstance(task.model, PeftModel)
        moved = arguments.init_from is not None or (peft and task.density() != 1)  # perhaps not where the base is
        bare = task.model.disable_adapter() if first and moved and peft else nullcontext()
        of_base = first and (not moved or peft) and accelerator.num_processes == 1

        def features_of(part: ImageDataset) -> Features:
            return base_features(arguments, part, partial(extract, task, part)) if of_base else extract(task, part)

        # Of a fine-tuned model's classes the names may not be known.
        same = test is not None and test.num_classes == task.objective.num_classes
        same = same and images.classes in (None, getattr(test, "classes", None))
        labelled = task.objective.needs_labels or (task.objective.consumes == "logits" and same)
        metrics = ["knn", *["linear_probe"] * arguments.eval_probe, *["accuracy"] * labelled]
        found: dict[str, Any] = {}
        if test is not None and bank is not None:
            with bare:
                values = measure(metrics, features_of(bank), features_of(test), arguments, task)
            found = {"evaluation": evaluation, **values}
        if held is not None:
            tested, metric = extract(task, held), "accuracy" if labelled else "knn"
            # The images trained on vote, and not `bank`, in which are those that are held out.
            voting = tested if labelled else extract(task, images.train)
            found["held_out"] = measure([metric], voting, tested, arguments, task)[metric]
        return found

    return evaluate
