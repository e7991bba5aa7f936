# SPDX-License-Identifier: Apache-2.0
"""`AdapterFacts`: what is known about an adapter, from the records that lie beside it; cards are rendered from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.registry import DATASETS
from ..evaluation import EvalReport, merge_reports
from ..storage import CONFIG_NAME, AdapterSizes, adapter_sizes, check_config, read_json
from .loading import base_code
from .names import hub_id, shown_name

__all__ = ["RUN_NAME", "AdapterFacts", "facts_of_folder"]

RUN_NAME = "run.json"  # `smn train` writes it beside the adapter
_SHOWN = (
    "epochs max_steps batch_size optimizer lr head_lr momentum weight_decay warmup_epochs mixed_precision score_dtype "
    "image_size head fraction limit seed"
).split()
_NUMBER = (int, float)
_KINDS: dict[str, Any] = dict.fromkeys(("arguments", "before", "after", "sizes", "versions"), dict)
_KINDS |= {"density": _NUMBER}
_KINDS_OF_ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("backbone", "backbone_revision", "weights", "dataset", "dataset_revision", "eval_split"), str),
    **dict.fromkeys(("head_classes", "seed", "image_size", "eval_limit", "knn_k"), int),
    **{"objective": str, "objective_options": dict, "pretrained": bool},
}
_MAY_DIFFER = frozenset(
    "seed output_dir resume log_every checkpoint_every keep_checkpoints log_with num_workers cache_images cpu".split()
)
_SHOWN_OF_MASK = (
    "target_modules mask_type threshold init_score density density_schedule scale batch_norm trainable_fraction "
    "select modules_to_save"
).split()


@dataclass(frozen=True)
class AdapterFacts:
    """Everything that a card says about an adapter.

    Attributes:
        title: Heading of the card.
        sizes: Bytes of the adapter file by purpose.
        base: Name of the base model as a card may show it; "" if unknown.
        base_id: Its repository on the Hub, None if it has none.
        base_revision: Git revision of that repository.
        fingerprint: Of the masked base weights.
        full_bytes: A checkpoint of all weights, as full fine-tuning would save it; None if unknown.
        density: Fraction of the masked weights that are active; None if unknown.
        dataset: Name of the dataset it was learned on, "" if unknown; as `load_images` takes it.
        dataset_revision: Git revision of the dataset.
        objective: What was learned, such as "cross_entropy"; "" if unknown.
        recipe: Option -> value, as a table shows them.
        reports: What the adapter is worth.
        baselines: What the frozen base is worth, and full fine-tuning where it was measured.
        code: Python lines that end with the base model in `base`.
        versions: Versions of the libraries that learned it.
        notes: Limits of this adapter beside those of every mask.
    """

    title: str
    sizes: AdapterSizes
    base: str = ""
    base_id: str | None = None
    base_revision: str | None = None
    fingerprint: str | None = None
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
    """What the files of a folder say about the adapter in it.

    Args:
        folder: The output folder of `smn train`, or any folder with an adapter.
        reports: Evaluations to show in the place of those at the end of training, such as `smn eval --json` writes.
        seeds: Folders of the same run with other seeds: results are shown over all of them.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A file is damaged, or a folder of `seeds` is another run or repeats a seed.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG_NAME, "name the output folder of smn train, or a folder with an adapter")
    config, sizes = check_config(config), adapter_sizes(folder)
    base = config.get("base_model_name_or_path")
    run = _read_run(folder / RUN_NAME, "") if (folder / RUN_NAME).exists() else {}
    arguments = run.get("arguments", {})
    name = arguments.get("backbone") or base
    found, before = _reports_of(run), _reports_of(run, frozen=True)
    for other in seeds:
        path = Path(other) / RUN_NAME
        more = _read_run(path, "name the output folders of smn train")
        _check_same(arguments, more.get("arguments", {}), path)
        found = [_merged(report, _reports_of(more), path) for report in found]
    return AdapterFacts(
        title=_title(name, arguments.get("dataset")),
        sizes=sizes,
        base=shown_name(name),
        base_id=hub_id(base) or hub_id(name),
        base_revision=arguments.get("backbone_revision") or config.get("revision"),
        fingerprint=config.get("base_fingerprint"),
        full_bytes=run.get("sizes", {}).get("full"),
        density=run.get("density"),
        dataset=arguments.get("dataset") or "",
        dataset_revision=arguments.get("dataset_revision"),
        objective=shown_name(arguments.get("objective")),
        recipe=_recipe(arguments, config),
        reports=list(reports) or found,
        baselines=before,
        code=base_code(folder, config, arguments),
        versions=run.get("versions", {}),
        notes=_notes(arguments),
    )


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {path}: {advice}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object. Copy it again.")
    return found


def _read_run(path: Path, advice: str) -> dict[str, Any]:
    """``run.json``, whose values have their kinds: they become text and code of a card, whoever wrote them."""
    run = _read_json(path, advice)
    arguments = run.get("arguments", {})
    for part, kinds in ((run, _KINDS), (arguments if isinstance(arguments, dict) else {}, _KINDS_OF_ARGUMENTS)):
        for name, kind in kinds.items():
            value = part.get(name)
            if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(
                    f"{path}: {name} is {repr(value)[:80]}, of another kind than a run writes: delete it."
                )
    return run


def _title(base: str | None, dataset: str | None) -> str:
    what = shown_name(base).rpartition("/")[2]
    if not dataset:
        return f"A mask for {what}" if what else "A mask"
    return f"{what or 'A model'} masked for {shown_name(dataset).partition('.')[0]}"


def _reports_of(run: Mapping[str, Any], frozen: bool = False) -> list[EvalReport]:
    """What ``run.json`` says of the end of training, or of the frozen base before it."""
    arguments = run.get("arguments", {})
    if not arguments.get("dataset") or not arguments.get("eval_split"):
        return []
    found = []
    for metric, value in run.get("before" if frozen else "after", {}).items():
        if frozen and metric == "accuracy" and arguments.get("objective") != "zero_shot":
            continue  # of a head that nothing has trained
        found.append(
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
        )
    return found


def _check_same(arguments: Mapping[str, Any], others: Mapping[str, Any], path: Path) -> None:
    names = sorted((set(arguments) | set(others)) - _MAY_DIFFER)
    if different := [name for name in names if arguments.get(name) != others.get(name)]:
        raise ValueError(f"{path} is no other seed of the same run: {', '.join(different)} differ.")


def _merged(report: EvalReport, others: Sequence[EvalReport], path: Path) -> EvalReport:
    for other in others:
        if other.metric == report.metric:
            try:
                return merge_reports([report, other])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path} has no {report.metric}: it is no other seed of the same run.")


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
    if arguments.get("weights"):
        notes.append(
            f"The base's weights came from a file ({shown_name(arguments['weights'])}), not from the Hub; where they "
            "differ from the Hub's by a bit, the adapter is refused."
        )
    if not arguments.get("pretrained", True):
        notes.append("The base has random weights: this adapter is a test, not a result.")
    if (limit := arguments.get("eval_limit")) is not None:
        notes.append(f"Evaluated on {limit} images of the split, not on all.")
    if (spec := DATASETS.get(arguments.get("dataset", ""))) is not None and spec.notes:
        notes.append(f"The dataset: {spec.notes}")
    return notes
