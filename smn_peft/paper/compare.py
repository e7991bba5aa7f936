# SPDX-License-Identifier: Apache-2.0
"""Methods compared fairly: as many trials each, on held-out images; the best of each within a size is tested once."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .._options import did_you_mean, merged
from ..analysis import plots
from ..backbones import Backbone
from ..evaluation import markdown_table
from ..training import TrainArguments, load_recipe
from ..training.arguments import objective_kind, read_recipe
from ..training.assemble import adapted, images_of_run, load_base
from ..tuner.targets import matching_names, resolve_targets
from .artefact import ARTEFACTS, TEXTS, Artefact, Cell, Record, Reproduction, reproduce
from .figures import mean_lines, picture
from .runs import RunSpec, RunStore
from .scales import Scale, Setting, read_yaml

# What the final runs of all methods have in common: files as they are shipped, and what is not measured left out.
_SHIPPED: dict[str, Any] = {"save_dtype": "bfloat16", "eval_probe": False, "mask": {"codec": "entropy"}}


@dataclass(frozen=True)
class Method:
    """A method of a comparison and its trials."""

    arguments: Mapping[str, Any]  # of `TrainArguments`, such as {"adapt": "lora"}
    trials: Mapping[str, Mapping[str, Any]]  # what each trial changes, learning rates and sizes, by its label
    before: str = ""  # row of the accuracy before training, at the probe that it starts from; none: it is not shown
    start: RunSpec | None = None  # a run without labels that it starts from


@dataclass(frozen=True)
class Comparison:
    """Methods on one backbone and one dataset."""

    label: str  # its section in tables
    base: Mapping[str, Any]  # arguments of the final runs that all methods share
    methods: Mapping[str, Method]
    held_out: float = 0.2  # the part of the training images that trials are measured on, and not trained on
    budgets: Sequence[float | None] = (None,)  # largest files in kB; None: of any size
    minutes: float = 0.0  # rough duration of a run

    @property
    def metric(self) -> str:
        """Accuracy of the head where the objective has labels, else k-NN."""
        return "accuracy" if objective_kind(TrainArguments(**self.base)).needs_labels else "knn"

    def final(self, method: Method, trial: Mapping[str, Any]) -> RunSpec:
        """The run that is tested, if the trial is chosen."""
        frozen = {} if method.arguments.get("adapt", "mask") == "mask" else {"mask": {"batch_norm": "frozen"}}
        arguments = merged(self.base, _SHIPPED, frozen, method.arguments, trial)
        return RunSpec(arguments, start=method.start, minutes=self.minutes)

    def cells(self) -> list[Cell]:
        """The cells of the trials and of what is before training: the frozen base's k-NN, the probe at the start."""
        cells = [cell for cell, _ in self.trial_cells()]
        frozen = [replace(cells[0], row="frozen base", column="", metric="frozen_knn")] if self.metric == "knn" else []
        for name, method in self.methods.items():
            frozen += self.starts(method, "", next(cell.run for cell in cells if cell.row == name))
        return cells + frozen

    def starts(self, method: Method, column: str, run: RunSpec) -> list[Cell]:
        """The cells of what a run of a method starts from: its probe; probes on a mask without labels and its base."""
        found = [("start_" + self.metric, method.before, run)] if method.before else []
        if run.start is not None:
            shots = {"frozen_low_shot": "frozen base", "low_shot": "mask without labels"}
            share = f"@{self.base['fraction']}"
            found += [(metric + share, f"low-shot probe, {of}", run.start) for metric, of in shots.items()]
        return [Cell(self.label, row, column, each, metric) for metric, row, each in found]

    def trial_cells(self) -> list[tuple[Cell, RunSpec]]:
        """A cell of every trial, measured on the held-out images, with the run that would be tested."""
        cells = []
        for name, method in self.methods.items():
            for label, trial in method.trials.items():
                final = self.final(method, trial)
                tried = final.at(eval_fraction=self.held_out)
                if final.start is not None:  # which has not seen these images either
                    tried = replace(tried, start=final.start.at(eval_fraction=self.held_out))
                cells.append((Cell(self.label, name, label, tried, self.metric), final))
        return cells


def read_methods(content: Mapping[str, Any], kind: str, where: str = "methods.yaml") -> dict[str, Method]:
    """Methods by name of a kind, such as "linear" or "convolutional", of what a YAML file holds.

    A trial is named by what it changes, such as "lr=0.01, r=4", unless it has a `label`.

    Raises:
        ValueError: Methods have unequal numbers of trials, or something is no option of `TrainArguments`.
    """
    if not isinstance(content.get(kind), Mapping):
        raise ValueError(f"{where} has no methods under {kind!r}: it holds {', '.join(map(str, content))}.")
    known, found = {each.name for each in fields(TrainArguments)}, {}
    for name, arguments in content[kind].items():
        trials = arguments.get("trials") if isinstance(arguments, Mapping) else None
        if not (isinstance(trials, list) and trials and all(isinstance(trial, Mapping) for trial in trials)):
            raise ValueError(f"{where}: {name!r} needs trials, such as trials: [{{lr: 0.01}}, {{lr: 0.1}}].")
        shared = _without(_without(arguments, "trials"), "before")
        labelled = {str(trial.get("label") or _label(trial)): _without(trial, "label") for trial in trials}
        if len(labelled) < len(trials):
            raise ValueError(f"{where}: {name!r} has one trial twice, or two of one label: {', '.join(labelled)}.")
        if unknown := {*shared, *(key for trial in labelled.values() for key in trial)} - known:
            first = min(unknown)
            raise ValueError(f"{where}: {name!r} has an unknown option {first!r}.{did_you_mean(first, known)}")
        found[name] = Method(shared, labelled, str(arguments.get("before", "")))
    check_trials(found)
    return found


def _label(trial: Mapping[str, Any]) -> str:
    return ", ".join(_label(v) if isinstance(v, Mapping) else f"{name}={v}" for name, v in trial.items())


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def check_trials(methods: Mapping[str, Method]) -> None:
    """Raise ValueError unless all methods have the same number of trials."""
    counts = [len(method.trials) for method in methods.values()]
    usual = statistics.mode(counts) if counts else 0
    for name, method in methods.items():
        if (count := len(method.trials)) != usual:
            raise ValueError(
                f"{name!r} has {count} trials and the others have {usual}: a comparison is fair only if every method "
                "has as many. Give it more or fewer rates or sizes."
            )


def comparison(
    name: str,
    title: str,
    note: str,
    comparisons: Callable[[Any], Sequence[Comparison]],
    seeds: int = 3,
    draw: Callable[[Record, Path], list[Path]] | None = None,
) -> Artefact:
    """The artefact whose cells are the trials at a scale, and that shows what was chosen once they are done.

    `draw` makes its pictures, of accuracy over bytes by default.
    """
    return Artefact(
        name,
        lambda scale: [cell for one in comparisons(scale) for cell in one.cells()],
        title,
        note,
        {},
        then=lambda store, scale: replace(_finals(name, title, note, comparisons(scale), store), draw=draw or _draw),
        draw=draw,
        seeds=seeds,
    )


def _finals(name: str, title: str, note: str, comparisons: Sequence[Comparison], store: RunStore) -> Artefact:
    """The artefact of the trials that were chosen within each budget, read from a store that holds all trials."""
    cells, trials = [], []
    for one in comparisons:
        measured: dict[str, list[tuple[float, float, RunSpec]]] = {method: [] for method in one.methods}
        for cell, final in one.trial_cells():
            spec = cell.run.seeded(0)
            value, size = (store.measure(spec, metric) for metric in (cell.metric, "bytes"))
            row = {"section": cell.section, "method": cell.row, "trial": cell.column, "run": spec.id}
            trials.append({**row, "final": final.seeded(0).id, "value": value, "bytes": size})
            if value is not None and size is not None:
                measured[cell.row].append((value, size, final))
        for budget in one.budgets:
            column = "any size" if budget is None else f"≤ {budget:g} kB"
            for method, runs in measured.items():
                if (chosen := best_within(runs, budget)) is not None:
                    cells.append(Cell(one.label, method, column, chosen, one.metric))
                    cells += one.starts(one.methods[method], column, chosen)
        if one.metric == "knn" and (own := [cell for cell in cells if cell.section == one.label]):
            columns = dict.fromkeys(cell.column for cell in own)
            cells += [Cell(one.label, "frozen base", column, own[0].run, "frozen_knn") for column in columns]
    details = partial(_details, trials)
    return Artefact(name, lambda _: cells, title, note, {}, details=details, incomplete=True)


def best_within(trials: Sequence[tuple[float, float, RunSpec]], budget: float | None) -> RunSpec | None:
    """Of (value, bytes, run) the run of the highest value whose file is at most `budget` kB; None if there is none."""
    fitting = [trial for trial in trials if budget is None or trial[1] <= 1e3 * budget]
    return max(fitting, key=lambda trial: (trial[0], -trial[1]))[2] if fitting else None


def _details(
    trials: Sequence[Mapping[str, Any]], store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]
) -> dict[str, Any]:
    """Trials and finals, each run once, and the table that says which of the finals are on the Pareto front."""
    labels = {trial["final"]: trial["trial"] for trial in trials}
    counts = Counter((trial["section"], trial["method"]) for trial in trials)
    finals: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in cells:
        first = cell.run.seeded(0).id
        if cell.metric not in ("accuracy", "knn") or (cell.section, cell.row, first) in finals:
            continue
        values, sizes = ([store.measure(cell.run.seeded(s), m) for s in seeds] for m in (cell.metric, "bytes"))
        place = {"section": cell.section, "method": cell.row, "trial": labels[first], "metric": cell.metric}
        tried = counts[cell.section, cell.row]
        finals[cell.section, cell.row, first] = {**place, "values": values, "bytes": sizes, "trials": tried}
    for section in dict.fromkeys(final["section"] for final in finals.values()):
        whole = [f for f in finals.values() if f["section"] == section and None not in f["values"]]
        front = plots.pareto_front([(statistics.fmean(f["bytes"]), statistics.fmean(f["values"])) for f in whole])
        for index, final in enumerate(whole):
            final["front"] = index in front
    rows = list(finals.values())
    return {"trials": list(trials), "finals": rows, "markdown": _table(rows)}


def _table(finals: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the finals, by section and size."""
    parts = []
    for section in dict.fromkeys(final["section"] for final in finals):
        rows = []
        for final in sorted((f for f in finals if f["section"] == section), key=_mean_size):
            known = [100 * value for value in final["values"] if value is not None]
            spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
            failed = f"{len(final['values']) - len(known)} of {len(final['values'])} failed"
            rows.append(
                {
                    "method": final["method"],
                    "file (kB)": f"{_mean_size(final) / 1e3:,.1f}",
                    f"{'k-NN' if final['metric'] == 'knn' else final['metric']} %": (
                        f"{statistics.fmean(known):.1f}{spread}" if len(known) == len(final["values"]) else failed
                    ),
                    "chosen trial": final["trial"],
                    "of trials": str(final["trials"]),
                    "on the front": "yes" if final.get("front") else "",
                }
            )
        parts += [f"### {section}: chosen trials, tested once", markdown_table(rows)]
    return "\n\n".join(parts)


def _mean_size(final: Mapping[str, Any]) -> float:
    return statistics.fmean([size for size in final["bytes"] if size is not None] or [0.0])


def _draw(record: Record, stem: Path) -> list[Path]:
    """Accuracy over the size of the file, a panel per section and a marker per method."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    metrics = set()
    for final in record["details"]["finals"]:
        lines = panels.setdefault(final["section"], {}).setdefault(final["method"], [])  # the same style everywhere
        metrics.add("k-NN accuracy" if final["metric"] == "knn" else "accuracy")
        if None not in final["values"]:
            values = [100 * value for value in final["values"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            lines.append((_mean_size(final) / 1e3, statistics.fmean(values), spread))
    drawn = {
        section: [plots.Series(name, *zip(*sorted(points), strict=True)) for name, points in rows.items() if points]
        for section, rows in panels.items()
    }
    if not any(drawn.values()):
        return []
    path = Path(f"{stem}.png")
    plots.plot_sizes(
        {s: lines for s, lines in drawn.items() if lines}, path, ylabel=f"test {' or '.join(metrics)} (%)"
    )
    return [path]


# --- The comparison of a scale, and a user's -------------------------------------------------------------------------

METHODS: dict[str, Any] = read_yaml("methods.yaml")
"""What ``methods.yaml`` holds: budgets, and methods by the kind of backbone or comparison that they are for."""


def _of_scale(name: str, scale: Scale) -> list[Comparison]:
    found = []
    for place in scale.choices[name]:
        setting: Setting = getattr(scale, place["of"])[place["setting"]]
        shared = setting.methods[place["recipe"]], setting.base, scale.datasets[place["dataset"]]
        options = {"budgets": place.get("budgets", METHODS["budgets"]), "minutes": setting.minutes}
        base, methods = merged(*shared, place.get("options", {})), read_methods(METHODS, place["kind"])
        found.append(Comparison(f"{setting.label}, {place['dataset']}", base, methods, **options))
    return found


for _name in ("methods", "unlabelled"):
    _texts = TEXTS[_name]
    ARTEFACTS[_name] = comparison(_name, _texts["title"], _texts["note"], partial(_of_scale, _name))


def _few_labels(scale: Scale) -> list[Comparison]:
    """A comparison for every fraction of the labels; the recipe few-labels starts from the mask without labels."""
    place, methods, found = scale.choices["figure3"], read_methods(METHODS, "few labels"), []
    for dataset in place["datasets"]:
        shared = scale.resnet.base, scale.datasets[dataset]
        seen = Comparison(dataset, merged(scale.main.methods[place["start"]], *shared), {}, minutes=scale.main.minutes)
        start = seen.final(Method({}, {}), {})
        own = {**methods, "few-labels": replace(methods["few-labels"], start=start)}
        for fraction in place["fractions"]:
            base = merged(load_recipe("few-labels"), *shared, place.get("options", {}), {"fraction": fraction})
            label = f"{dataset}, {100 * fraction:g} % of labels"
            found.append(Comparison(label, base, own, minutes=scale.resnet.minutes))
    return found


def _draw_few_labels(record: Record, stem: Path) -> list[Path]:
    """A picture per dataset: accuracy over the percentage of labels, a line per row."""
    datasets: dict[str, list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        dataset, _, column = cell["section"].rpartition(", ")
        datasets.setdefault(dataset, []).append({**cell, "column": column})
    return [
        path
        for dataset, cells in datasets.items()
        for path in picture(Path(f"{stem}-{dataset}"), plots.plot_low_shot, mean_lines(cells), title=dataset)
    ]


_texts = TEXTS["figure3"]
ARTEFACTS["figure3"] = comparison("figure3", _texts["title"], _texts["note"], _few_labels, draw=_draw_few_labels)


def compare(
    values: Mapping[str, Any],
    *,
    methods: Sequence[str] = (),
    grid: str | Path | None = None,
    budgets: Sequence[float] = (),
    held_out: float = 0.2,
    seeds: int = 3,
    output: str | Path = "runs/compare",
    say: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Compare methods on a backbone and a dataset, under any objective; what is done is not done again.

    Args:
        values: Arguments of `TrainArguments` that all methods share: a recipe's, `backbone`, `dataset` ….
        methods: Names of the methods, of those in the grid; none: all that the backbone can take.
        grid: A YAML file of methods and their trials; None: the package's ``methods.yaml``.
        budgets: Largest files in kB; none: the grid's. The best file of any size is always shown.
        held_out: The part of the training images that trials are measured on.
        seeds: Number of seeds of the runs that are tested.
        output: Folder of the runs and of what is written.
        say: Called with a line of text when a run starts.

    Raises:
        ValueError: Methods have unequal numbers of trials, a method that was asked for cannot take the backbone, or
            there are no labelled images to test on beside the training split's.
        Interrupted: After Ctrl-C; the same call goes on.
    """
    arguments = TrainArguments(**values)
    if arguments.eval_fraction is not None:
        raise ValueError("compare holds images out itself, and tests on eval_split: leave eval_fraction out.")
    arguments, images = images_of_run(arguments)
    if images.test is None:
        raise ValueError(f"compare needs labelled images to test on, and {arguments.dataset} has none.")
    if images.test.split == images.train.split:  # trials would be measured on these as well
        fix = "put some into a folder or file of their own, and name it by eval_split"
        raise ValueError(f"compare needs images to test on beside the split {images.test.split!r}: {fix}.")
    backbone = load_base(arguments)
    content = METHODS if grid is None else read_recipe(grid)
    found = read_methods(content, kind_of(backbone.model, arguments), str(grid or "methods.yaml"))
    if unknown := [name for name in methods if name not in found]:
        known = f"there are {', '.join(found)}.{did_you_mean(unknown[0], found)}"
        raise ValueError(f"There is no method {unknown[0]!r} for {arguments.backbone}: {known}")
    base = {**values, "eval_split": arguments.eval_split}
    chosen = {name: found[name] for name in methods or found}
    largest = [*(budgets or content.get("budgets") or ()), None]
    label = ", ".join(_short(name) for name in (backbone.name, images.train.name))
    one = Comparison(label, base, chosen, held_out, tuple(dict.fromkeys(largest)))
    left_out = {name: reason for name in chosen if (reason := _problem(one, name, backbone))}
    if asked := [name for name in methods if name in left_out]:
        raise ValueError(left_out[asked[0]])
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    one = replace(one, methods={name: method for name, method in chosen.items() if name not in left_out})
    check_trials(one.methods)
    note = " ".join([TEXTS["methods"]["note"], *(f"Left out: {name} ({why})" for name, why in left_out.items())])
    title = f"Methods on {one.label}"
    return reproduce(comparison("compare", title, note, lambda _: [one]), None, seeds=seeds, output=output, say=say)


def _short(name: str) -> str:
    """A name for tables: of a path its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def kind_of(model: nn.Module, arguments: TrainArguments) -> str:
    """Kind of the layers that would be masked: "convolutional" if there is a convolution among them, else "linear"."""
    layers = map(model.get_submodule, matching_names(model, resolve_targets(model, arguments.mask.target_modules)))
    return (
        "convolutional" if any(isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for layer in layers) else "linear"
    )


def _problem(one: Comparison, name: str, backbone: Backbone) -> str | None:
    """Why a method cannot take a backbone, or None."""
    built = []
    for trial in one.methods[name].trials.values():
        try:
            arguments = TrainArguments(**one.final(one.methods[name], trial).arguments)
            if (key := (arguments.peft, arguments.mask)) not in built:
                adapted(arguments, replace(backbone, model=copy.deepcopy(backbone.model)), None)
        except ValueError as error:
            return str(error)
        built.append(key)
    return None
