# SPDX-License-Identifier: Apache-2.0
"""Load what a run saved, by its ``run.json`` or the adapter alone, and evaluate it on any labelled dataset."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from .._options import did_you_mean
from ..backbones import Backbone, is_file_spec, load_backbone, load_classifier, load_from_file, name_read_from
from ..data import check_preprocessing
from ..evaluation import PAPER_DECAY, EvalReport, extract_features, low_shot_reports
from ..objectives import list_objectives
from ..storage.adapter_config import CONFIG_NAME, read_config
from ..storage.adapter_file import (
    BASE_PREFIX,
    AdapterSizes,
    adapter_sizes,
    read_adapter_file,
)
from ..tuner import MaskConfig
from ..tuner.checks import fingerprints
from .adapters import WITHOUT_PEFT, select_trainable, trained_names
from .arguments import TrainArguments
from .assemble import METRICS, build_images, build_objective, cast_base, evaluation_of, load_base, measure
from .checkpoint import latest_checkpoint
from .run import MODEL_NAME, RUN_NAME, RunSummary
from .task import TrainingTask


def arguments_of(summary: RunSummary, backbone: str | None = None) -> TrainArguments:
    """Arguments that a run was started with, its base at `backbone` if given.

    Nothing in a ``run.json``, which anybody may have written, names a program: of an objective in a user's file only
    the name is kept, and a base in one must be given.
    """
    names = [field.name for field in fields(TrainArguments)]
    found = {name: summary.arguments[name] for name in names if name in summary.arguments}
    found["backbone"] = backbone or name_read_from(RUN_NAME, str(found.get("backbone", "")))
    if is_file_spec(str(found.get("objective", ""))):
        found["objective"] = found["objective"].rpartition(":")[2]
    return TrainArguments(**found)


def load_run(
    folder: str | Path, *, base: bool = False, backbone: str | None = None, image_size: int | None = None
) -> tuple[TrainArguments | None, Backbone]:
    """Load the model that a run saved, in eval mode, with images prepared as in training.

    Args:
        folder: The run's `output_dir`, or any folder with an adapter.
        base: The frozen base alone, without adapter and head.
        backbone: Where the base is now, if not where the folder says.
        image_size: Another side of the images than in training; a warning says so.

    Returns:
        The run's arguments, None where there is no ``run.json``; and the backbone, its model a `PeftModel` over the
        base, or, after full fine-tuning, the model itself. With a head it gives logits, and `features` those before.

    Raises:
        FileNotFoundError: If nothing is saved there.
        ValueError: If the base cannot be known, or the saved weights do not belong to it.
    """
    folder = Path(folder)
    summary = RunSummary.load(folder) if (folder / RUN_NAME).is_file() else None
    # How images were prepared in training: by the adapter's config, else by run.json.
    saved = read_config(folder).get("preprocessing") if (folder / CONFIG_NAME).is_file() else None
    saved = saved or (summary.arguments.get("preprocessing") if summary is not None else None)
    try:
        saved = None if saved is None else check_preprocessing(saved)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    arguments: TrainArguments | None = None
    if summary is not None:
        arguments = arguments_of(summary, backbone)
        arguments = replace(arguments, image_size=image_size or arguments.image_size)
        loaded = load_base(arguments, None if base else summary.arguments.get("head_classes"))
    else:
        loaded = _base_of_adapter(folder, base, backbone, image_size or (saved or {}).get("image_size"))
    if saved is not None:
        loaded = loaded.prepared_as(saved)
        if image_size not in (None, saved["image_size"]):
            what = f"{folder} was trained on images of {saved['image_size']} pixels, and is used on {image_size}"
            fix = "as image_size says: leave it out for what it was trained for"
            warnings.warn(f"{what}, {fix}.", stacklevel=2)
    if image_size is not None:
        loaded = loaded.prepared_as({"image_size": image_size})
    if base:
        return arguments, loaded
    if arguments is None or arguments.adapt not in WITHOUT_PEFT:
        read_config(folder)  # before PEFT reads it, which waits for a FIFO
        model: Any = PeftModel.from_pretrained(loaded.model, str(folder))
    else:
        model, path = loaded.model, folder / MODEL_NAME
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist{_unfinished(folder)}.")
        try:
            tensors, adapt = read_adapter_file(path), arguments.adapt
            wanted = trained_names(select_trainable(model, adapt), statistics=adapt == "statistics")
            # Strictly where the file has to hold all; it may hold more, as those of earlier versions do.
            model.load_state_dict({**model.state_dict(), **tensors})
            if missing := [name for name in wanted if name not in tensors]:
                raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit the model that {folder / RUN_NAME} names: {error}") from error
    return arguments, replace(loaded, model=model.eval())


def load_masks(folder: str | Path, *, backbone: str | None = None) -> dict[str, Tensor]:
    """Load the bool masks, by weight name, of a run's folder or an adapter's; see [`load_run`]."""
    arguments, loaded = load_run(folder, backbone=backbone)
    if arguments is not None and arguments.adapt != "mask":
        raise ValueError(f"{folder} holds no mask: it was trained with adapt={arguments.adapt!r}.")
    masks: dict[str, Tensor] = loaded.model.masks()  # type: ignore[operator]
    return masks


def save_run_as(folder: str | Path, out: str | Path, codec: str, backbone: str | None = None) -> AdapterSizes:
    """Load an adapter over its base and save it in folder `out` with another codec; see [`load_run`]."""
    model, config = _load_adapter(folder, backbone)
    config.codec = codec  # type: ignore[assignment]  # checked on saving
    model.save_pretrained(str(out), save_embedding_layers=False)
    return adapter_sizes(out)


def verify_run(folder: str | Path, backbone: str | None = None) -> str:
    """Check that an adapter's base is its mask's, even if `check_base` is off, and return the fingerprint of both."""
    model, config = _load_adapter(folder, backbone)
    # Not of the config: where the file names none, loading fills in that of the base at hand.
    expected, present = read_config(folder).get("base_fingerprint"), fingerprints(model, "default", config)[0]
    if expected is None:
        raise ValueError(f"{folder} names no fingerprint of its base: save it again with model.save_pretrained.")
    if present != expected:
        raise ValueError(f"{folder} was made for a base with fingerprint {expected}; this base has {present}.")
    return str(present)


def _load_adapter(folder: str | Path, backbone: str | None) -> tuple[PeftModel, MaskConfig]:
    model = load_run(folder, backbone=backbone)[1].model
    if not isinstance(model, PeftModel):
        raise ValueError(f"{folder} holds a fully fine-tuned model and no adapter.")
    config: MaskConfig = model.peft_config["default"]  # type: ignore[assignment]
    return model, config


def _base_of_adapter(folder: Path, base: bool, backbone: str | None, image_size: int | None) -> Backbone:
    """The base that ``adapter_config.json`` names, with a head where the adapter's file holds one."""
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {RUN_NAME} and no {CONFIG_NAME}{_unfinished(folder)}.")
    config = read_config(folder)
    name = backbone or name_read_from(folder / CONFIG_NAME, config.get("base_model_name_or_path") or "")
    if not name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base: name it, as in --backbone timm/resnet18.a1_in1k.")
    if is_file_spec(name):  # the caller's own
        loaded = load_from_file(name)
    else:
        kind = (config.get("auto_mapping") or {}).get("base_model_class", "")
        options: dict[str, Any] = {"revision": config.get("revision"), "projection": "WithProjection" in kind}
        loaded = load_backbone(name, **options)
        if image_size not in (None, loaded.image_size):  # asked for only then: most models take no argument for it
            loaded = load_backbone(name, image_size=image_size, **options)
    cast_base(loaded.model, str(config.get("base_fingerprint") or "float32").partition(":")[0])
    if base:
        return loaded
    try:
        tensors = read_adapter_file(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: the copy of the adapter is incomplete.") from error
    if not any(key.startswith(f"{BASE_PREFIX}backbone.") for key in tensors):
        return loaded
    if (head := f"{BASE_PREFIX}head.weight") not in tensors:
        fix = "keep the run's folder together, or load the base yourself and use PeftModel.from_pretrained"
        raise ValueError(f"{folder} holds no head of its classifier, and no {RUN_NAME} says how it was made: {fix}.")
    return load_classifier(loaded, len(tensors[head]))


def _unfinished(folder: Path) -> str:
    newest = latest_checkpoint(folder)
    if newest is None:
        return ": name the output_dir of a finished run, or the folder of an adapter"
    return f", only {newest.name} of a run that is not finished: go on with it by smn train … --resume"


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluate_run(
    folder: str | Path,
    *,
    base: bool = False,
    backbone: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    metrics: Sequence[str] = (),
    low_shot: Sequence[float] = (),
    seeds: int = 3,
    batch_size: int | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    eval_fraction: float | None = None,
    image_size: int | None = None,
    accelerator: Accelerator | None = None,
) -> list[EvalReport]:
    """Evaluate what a run saved, on its own dataset as at the end of training; what is None is as in the run.

    Args:
        folder: The run's `output_dir`, or a folder with an adapter, whose `dataset` must then be named.
        base: Evaluate the frozen base instead; it has accuracy under zero-shot only.
        backbone: Where the base is now, if not where the folder says.
        dataset: Another dataset, as `load_images` takes it.
        split: Split to test on.
        metrics: Of `METRICS`. None given: k-NN, and accuracy where there is a classifier.
        low_shot: Fractions of the labels to fit linear probes on, over `seeds` seeds each.
        seeds: Number of seeds.
        batch_size: Images per forward.
        num_workers: Processes that read images.
        limit: Use a seeded choice of at most this many images on either side.
        eval_fraction: Test on this part of the training split's images, held out as in training.
        image_size: Another side of the images than in training; a warning says so.
        accelerator: Names the device and shares the work; None: a new one.
    """
    check_metrics(metrics)
    if wrong := [fraction for fraction in low_shot if not 0 < fraction <= 1]:
        raise ValueError(f"A low-shot fraction must lie in (0, 1]; got {wrong[0]}: 10 % of the labels is 0.1.")
    counts = {"seeds": seeds, "limit": limit, "batch_size": batch_size, "image_size": image_size}
    for what, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{what} must be at least 1; got {count}.")
    run, loaded = load_run(folder, base=base, backbone=backbone, image_size=image_size)
    facts = RunSummary.load(folder).arguments if run is not None else {}
    arguments = evaluation_arguments(run, loaded, Path(folder), dataset, split, limit, eval_fraction)
    zero_shot, has_head = run is not None and run.objective == "zero_shot", facts.get("head_classes") is not None
    chosen = list(dict.fromkeys(metrics))
    if not chosen and not low_shot:
        same = run is not None and arguments.dataset == run.dataset
        chosen = ["knn", "accuracy"] if zero_shot or (has_head and same) else ["knn"]
    if base and has_head:
        chosen = [name for name in chosen if name != "accuracy"]
    if "accuracy" in chosen and not (zero_shot or has_head):
        raise ValueError(f"{folder} holds no classifier, so there is no accuracy: take knn or linear_probe.")
    if not chosen and not low_shot:
        raise ValueError("The frozen base has no head of its own, so no accuracy: take knn or linear_probe.")
    images = build_images(arguments)
    bank, test = images.bank, images.test
    assert bank is not None
    assert test is not None
    accelerator = accelerator or Accelerator(cpu=arguments.cpu)
    loaded.model.to(accelerator.device)
    task = None
    if "accuracy" in chosen:
        if not zero_shot and facts.get("classes") != images.train.classes:
            other = f"for other classes than those of {arguments.dataset}"
            raise ValueError(f"The head of {folder} was trained {other}: take knn or linear_probe.")
        kind = replace(arguments, objective="zero_shot" if zero_shot else "cross_entropy", objective_options={})
        objective = build_objective(kind, loaded, images.num_classes, images.train.classes)
        task = TrainingTask(loaded.model, objective.to(accelerator.device))
    extract = partial(
        extract_features,
        loaded.model,
        transform=evaluation_of(loaded),
        batch_size=batch_size or arguments.batch_size,
        num_workers=arguments.num_workers if num_workers is None else num_workers,
        accelerator=accelerator,
    )
    tested = extract(dataset=test)
    seen = extract(dataset=bank) if low_shot or chosen != ["accuracy"] else tested
    settings = {
        "backbone": loaded.name,
        "adapt": "none" if base else run.adapt if run else "mask",
        "training_images": len(bank),
        "test_images": len(test),
    }
    label, reports = f"{loaded.name} (frozen)" if base else Path(folder).resolve().name, []
    where: dict[str, Any] = {"label": label, "dataset": test.name, "split": test.split, "revision": test.revision}
    for metric, value in measure(chosen, seen, tested, arguments, task).items():
        more = {"k": arguments.knn_k} if metric == "knn" else {}
        reports.append(EvalReport(metric=metric, values=(value,), settings={**settings, **more}, **where))
    for fraction in dict.fromkeys(low_shot):
        per_class = fraction * len(seen) / (images.num_classes or 1)
        where["probe"] = {"decays": [PAPER_DECAY]} if per_class < 1.5 else {}  # none left to choose on
        where |= {"metric": f"linear_probe@{fraction:g}", "seeds": range(seeds), "settings": settings}
        reports += low_shot_reports(seen, tested, fractions=[fraction], **where)
    return reports


def check_metrics(metrics: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Raise ValueError for a metric that is not known, naming those that are."""
    for name in metrics:
        if name not in known:
            raise ValueError(f"Unknown metric {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")


def evaluation_arguments(
    run: TrainArguments | None,
    loaded: Backbone,
    folder: Path,
    dataset: str | None,
    split: str | None,
    limit: int | None,
    eval_fraction: float | None = None,
) -> TrainArguments:
    """Arguments that name the images to evaluate a run on: its own, or another dataset read as a fresh run would."""
    if run is None:
        if dataset is None:
            raise ValueError(f"{folder} has no {RUN_NAME} that says what it was trained on: name a dataset.")
        run = TrainArguments(backbone=loaded.name, dataset=dataset, objective="swav")
    elif dataset not in (None, run.dataset):
        fresh = TrainArguments(backbone=run.backbone, dataset=str(dataset))
        own = "dataset dataset_revision image_column label_column train_split eval_split eval_fraction".split()
        own += "streaming steps_per_epoch shuffle_buffer num_classes".split()
        run = replace(run, **{name: getattr(fresh, name) for name in (*own, "templates", "limit", "class_limit")})
    changes: dict[str, Any] = {"eval_split": split or run.eval_split or "test", "fraction": 1.0}
    changes |= {"indices_file": None, "keep_best": None}
    if split is not None or eval_fraction is not None:
        changes["eval_fraction"] = eval_fraction
    if run.objective not in list_objectives():
        changes["objective"] = "swav"  # evaluation takes none: a user's own may be gone
    if limit is not None:
        changes |= {"eval_limit": limit, "knn_limit": limit}
    return replace(run, **changes)
