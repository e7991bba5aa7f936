# SPDX-License-Identifier: Apache-2.0
"""`AdapterFacts`: what the records beside an adapter say of it, made fit for a page that anybody reads."""

from __future__ import annotations

import json
import keyword
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from safetensors import safe_open

from ..backbones import is_file_spec
from ..data.registry import DATASETS
from ..evaluation import EvalReport, merge_reports
from ..storage.adapter_config import read_config
from ..storage.adapter_file import BASE_PREFIX, WEIGHTS_NAME, AdapterSizes, adapter_sizes
from ..storage.files import read_json

RUN_NAME = "run.json"  # `smn train` writes it beside the adapter
_SHOWN = (
    "epochs max_steps batch_size optimizer lr head_lr momentum weight_decay warmup_epochs mixed_precision score_dtype "
    "image_size head fraction limit seed"
).split()
_SHOWN_OF_MASK = (
    "target_modules mask_type threshold init_score density density_schedule scale batch_norm trainable_fraction "
    "select modules_to_save"
).split()
_MAY_DIFFER = frozenset(
    "seed output_dir resume log_every checkpoint_every keep_checkpoints log_with num_workers cache_images cpu".split()
)
# Of the values that become text and code of a card.
_KINDS = {**dict.fromkeys(("arguments", "before", "after", "sizes", "versions"), dict), "density": (int, float)}
_KINDS_OF_ARGUMENTS = {
    **dict.fromkeys(("backbone", "backbone_revision", "weights", "dataset", "dataset_revision", "eval_split"), str),
    **dict.fromkeys(("head_classes", "seed", "image_size", "eval_limit", "knn_k"), int),
    **{"objective": str, "objective_options": dict, "pretrained": bool},
}
_FILES = (".npz", ".parquet", ".safetensors")
_REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
# What is no id on the Hub: a timm name, or the last part of a path, perhaps with a function.
_OWN_NAME = re.compile(r"[\w.-]+(\.py:\w+)?", re.ASCII)


@dataclass(frozen=True)
class AdapterFacts:
    """Everything that a card says about an adapter; "" or None is what is not known.

    `base` is the base model's name and `base_id` its repository on the Hub, `full_bytes` the size of a checkpoint of
    all weights, `dataset` a name as `load_images` takes it, `recipe` the options as a table shows them. `baselines`
    are of the frozen base, and of full fine-tuning where it was measured; the Python lines of `code` end with the
    base model in `base`; `notes` are limits beside those of every mask.
    """

    title: str
    sizes: AdapterSizes
    base: str = ""
    base_id: str | None = None
    base_revision: str | None = None
    full_bytes: int | None = None
    density: float | None = None
    dataset: str = ""
    dataset_revision: str | None = None
    objective: str = ""
    recipe: Mapping[str, str] = field(default_factory=dict)
    reports: Sequence[EvalReport] = ()
    baselines: Sequence[EvalReport] = ()
    code: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def facts_of_folder(
    folder: str | Path, *, reports: Sequence[EvalReport] = (), seeds: Sequence[str | Path] = ()
) -> AdapterFacts:
    """Read what the files of a folder say about the adapter in it; ValueError if one is damaged.

    Args:
        folder: The output folder of `smn train`, or any folder with an adapter.
        reports: Evaluations to show instead of those at the end of training, such as `smn eval --json` writes.
        seeds: Folders of the same run with other seeds: results are shown over all. ValueError if they are not.
    """
    folder = Path(folder)
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    run = _read_run(folder / RUN_NAME) if (folder / RUN_NAME).exists() else {}
    arguments = run.get("arguments", {})
    name = arguments.get("backbone") or base
    dataset = arguments.get("dataset") or ""
    what = shown_name(name).rpartition("/")[2]
    title = f"A mask for {what}" if what else "A mask"
    if dataset:
        title = f"{what or 'A model'} masked for {shown_name(dataset).partition('.')[0]}"
    return AdapterFacts(
        title=title,
        sizes=adapter_sizes(folder),
        base=shown_name(name),
        base_id=hub_id(base) or hub_id(name),
        base_revision=arguments.get("backbone_revision") or config.get("revision"),
        full_bytes=run.get("sizes", {}).get("full"),
        density=run.get("density"),
        dataset=dataset,
        dataset_revision=arguments.get("dataset_revision"),
        objective=shown_name(arguments.get("objective")),
        recipe=_recipe(arguments, config),
        reports=list(reports) or _over_seeds(run, seeds),
        baselines=_reports(run, frozen=True),
        code=base_code(folder, config, arguments),
        versions=run.get("versions", {}),
        notes=_notes(arguments),
    )


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {path}: name the output folders of smn train.") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path} is damaged: it holds no object. Copy it again.")
    run = _checked(run, _KINDS, path)
    return {**run, "arguments": _checked(run.get("arguments", {}), _KINDS_OF_ARGUMENTS, path)}


def _checked(part: Mapping[str, Any], kinds: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is not null; ValueError for a value of another kind than a run writes."""
    found = {name: value for name, value in part.items() if value is not None}
    for name, value in found.items():
        kind = kinds.get(name, object)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise ValueError(f"{path}: {name} is {repr(value)[:80]}, which no run writes: delete it.")
    return found


def _reports(run: Mapping[str, Any], frozen: bool = False) -> list[EvalReport]:
    """Evaluations at the end of training, or of the frozen base before it."""
    arguments = run.get("arguments", {})
    values = dict(run.get("before" if frozen else "after", {}))
    if not arguments.get("dataset") or not arguments.get("eval_split"):
        return []
    if frozen and arguments.get("objective") != "zero_shot":
        values.pop("accuracy", None)  # of a head that nothing has trained
    return [
        EvalReport(
            label="frozen base" if frozen else "this adapter",
            dataset=arguments["dataset"],
            split=arguments["eval_split"],
            metric=metric,
            values=(value,),
            seeds=() if frozen else (arguments.get("seed", 0),),
            revision=arguments.get("dataset_revision"),
            settings={"k": arguments["knn_k"]} if metric == "knn" and "knn_k" in arguments else {},
            versions=run.get("versions", {}),
        )
        for metric, value in values.items()
    ]


def _over_seeds(run: Mapping[str, Any], seeds: Sequence[str | Path]) -> list[EvalReport]:
    """Evaluations at the end of a run, merged with those of the same run with other seeds."""
    found, arguments = _reports(run), run.get("arguments", {})
    for path in (Path(folder) / RUN_NAME for folder in seeds):
        other = _read_run(path)
        others = other["arguments"]
        names = sorted((set(arguments) | set(others)) - _MAY_DIFFER)
        if different := [name for name in names if arguments.get(name) != others.get(name)]:
            raise ValueError(f"{path} is no other seed of the same run: {', '.join(different)} differ.")
        by_metric = {report.metric: report for report in _reports(other)}
        try:
            found = [merge_reports([report, by_metric[report.metric]]) for report in found]
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: it is no other seed of the same run.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def _recipe(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    rows: dict[str, Any] = {"objective": shown_name(arguments.get("objective"))}
    rows |= {key: arguments[key] for key in _SHOWN if key in arguments}
    rows |= {f"objective_options.{key}": value for key, value in arguments.get("objective_options", {}).items()}
    rows |= {f"mask.{key}": config[key] for key in _SHOWN_OF_MASK if key in config}
    return {key: _cell(value) for key, value in rows.items() if value not in (None, "", [])}


def _cell(value: Any) -> str:
    if isinstance(value, list):
        names = [str(item) for item in value]
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _notes(arguments: Mapping[str, Any]) -> list[str]:
    notes = []
    if weights := shown_name(arguments.get("weights")):
        what = f"The base's weights came from a file ({weights}), not from the Hub"
        notes.append(f"{what}; where they differ from the Hub's by a bit, the adapter is refused.")
    if not arguments.get("pretrained", True):
        notes.append("The base has random weights: this adapter is a test, not a result.")
    if (limit := arguments.get("eval_limit")) is not None:
        notes.append(f"Evaluated on {limit} images of the split, not on all.")
    if (spec := DATASETS.get(arguments.get("dataset", ""))) is not None and spec.notes:
        notes.append(f"The dataset: {spec.notes}")
    return notes


def base_code(folder: Path, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Write the import lines, an empty line, and the lines that make `base` as it was in training.

    `arguments` are the run's, empty if there was none: then the adapter's file tells how many classes a head has.
    """
    mapping = config.get("auto_mapping") or {}
    kind, library = (mapping.get(key) or "" for key in ("base_model_class", "parent_library"))
    name = arguments.get("backbone") or config.get("base_model_name_or_path")
    repository, shown = hub_id(name), shown_name(name)
    if repository or _OWN_NAME.fullmatch(shown):
        if arguments or library.startswith("smn_peft."):
            return _backbone_code(folder, str(name), config, arguments, kind)
        is_class = kind.isascii() and kind.isidentifier() and not keyword.iskeyword(kind)
        if library.startswith("transformers.") and repository and is_class:
            options = as_options(revision=config.get("revision") or None)
            return f"from transformers import {kind}\n\nbase = {kind}.from_pretrained({as_code(name)}{options})"
        if library.startswith("timm."):
            shown = as_code(f"hf-hub:{repository}" if repository else shown)
            return f"import timm\n\nbase = timm.create_model({shown}, pretrained=True)  # with the same head"
    return "\nbase = ...  # the model that the mask was learned on, loaded as it was then"


def _backbone_code(folder: Path, name: str, config: Mapping[str, Any], arguments: Mapping[str, Any], kind: str) -> str:
    """Load the base by this package's own loaders, as `smn train` does."""
    weights, seed = arguments.get("weights"), arguments.get("seed", 0)
    made = not (weights or arguments.get("pretrained", True))
    loader, options = "load_from_file", ""
    if not is_file_spec(name):
        loader = "load_backbone"
        options = as_options(
            pretrained=False if made else None,
            state_dict=shown_name(weights) or None,
            image_size=arguments.get("image_size"),
            revision=arguments.get("backbone_revision") or config.get("revision"),
            projection=True if arguments.get("objective") == "zero_shot" or "WithProjection" in kind else None,
        )
    classes = arguments.get("head_classes")
    if not arguments:
        key = f"{BASE_PREFIX}head.weight"
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            classes = file.get_slice(key).get_shape()[0] if key in file.keys() else None
    lines = [f"from smn_peft.backbones import {loader}" + (", load_classifier" if classes else ""), ""]
    if made or loader == "load_from_file":
        seeding = f"torch.manual_seed({as_code(seed)})  # as in training, for weights that no file gives"
        lines = ["import torch", *lines, seeding]
    lines.append(f"backbone = {loader}({as_code(shown_name(name))}{options})")
    if classes:
        lines.append(f"backbone = load_classifier(backbone, {as_code(classes)}{as_options(head_seed=seed or None)})")
    return "\n".join([*lines, "base = backbone.model"])


def _is_local(name: str) -> bool:
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or name.endswith(_FILES)
    return is_path or is_file_spec(name) or os.path.exists(name)


def hub_id(name: str | None) -> str | None:
    """The repository that a model's or dataset's name means, without timm's "hf-hub:"; None for a file or folder."""
    if not name or _is_local(name):
        return None
    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return name if _REPOSITORY.fullmatch(name) else None


def dataset_id(name: str | None) -> str | None:
    """The dataset's repository on the Hub, of a name that `load_images` knows or the id itself; None without one."""
    return DATASETS[name].hub_id if name in DATASETS else hub_id(name)


def shown_name(name: str | None) -> str:
    """The name as a card may show it: of a path on somebody's disk its last part only; "" for None."""
    if not name:
        return ""
    return PurePath(name).name if _is_local(name) else name


def as_text(value: object) -> str:
    """A value from a record as Markdown that shows it on one line: nothing in it is a link, an image or HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def as_span(value: object) -> str:
    """A value from a record as a code span of Markdown, which knows no escapes: what could end it is replaced."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("<", "(").replace(">", ")") + "`"


def as_code(value: Any) -> str:
    """A JSON value as a Python literal, which also leaves the block of code that it stands in as it is."""
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text.replace("`", "\\x60").replace("<", "\\x3c")  # both are found in texts only


def as_options(**options: Any) -> str:
    """Further arguments of a call, those that are not None."""
    return "".join(f", {name}={as_code(value)}" for name, value in options.items() if value is not None)
