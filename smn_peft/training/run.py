# SPDX-License-Identifier: Apache-2.0
"""`run`: a whole training from its arguments to the saved adapter, evaluated before and after; `run_many`: several."""

from __future__ import annotations

import _thread
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from filelock import SoftFileLease, Timeout
from peft import PeftModel
from safetensors.torch import save
from torch import Tensor

from ..evaluation import library_versions
from ..hub import RUN_NAME, full_bytes, write_card
from ..storage.adapter_config import CONFIG_NAME
from ..storage.adapter_file import WEIGHTS_NAME, adapter_sizes
from ..storage.files import atomic_write, read_json, to_disk
from ..storage.fingerprint import tensor_digest
from .arguments import TrainArguments, as_facts, check_same
from .assemble import (
    METRICS,
    FineTuned,
    build_task,
    build_train_loader,
    evaluator_of,
    images_of_run,
    model_digest,
    share,
)
from .checkpoint import latest_checkpoint, start_digest
from .metrics import METRICS_NAME, TrainingFailure, read_metrics
from .processes import build_accelerator, decided, on_main_process, together
from .task import TrainingTask
from .trainer import Trainer, steps_per_epoch

MODEL_NAME = "model.safetensors"
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)
"""Errors whose message says what to do; others are bugs, and end everything."""
LEASE = 60.0
"""Seconds without a sign of life after which another machine takes an output folder over."""


class FolderInUse(RuntimeError):
    """Another run is at work in an output folder."""


@dataclass
class RunSummary:
    """What a run was and what came of it; written as ``run.json`` beside the adapter.

    Attributes:
        arguments: The arguments and facts, JSON-compatible.
        before: Evaluation of the frozen base, by metric; of the start where `init_from` gave a model without an
            adapter; empty where the run was resumed with another evaluation.
        after: Evaluation at the end.
        best_step: Step whose state `keep_best` ended in; None without.
        loss: Mean loss of the last logged window.
        seconds: Time of the training loop in all sessions, evaluations included.
        images_per_second, waiting_for_data: Medians over the logged windows.
        sizes: Bytes of the saved file, `total`, and of a mask's by part; `full`: of all weights and statistics.
    """

    arguments: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    loss: float | None
    density: float | None
    steps: int
    seconds: float
    images_per_second: float | None
    sizes: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    waiting_for_data: float | None = None
    best_step: int | None = None

    def text(self) -> str:
        """Lines for a terminal."""
        lines = [f"{self.steps} steps in {self.seconds:.0f} s, in {self.arguments['output_dir']}"]
        if self.best_step is not None:
            lines.append(f"kept: the state after step {self.best_step}")
        density = [] if self.density is None else [f"density {self.density:.4f}"]
        if "total" in self.sizes:  # earlier versions counted adapters only
            lines.append(", ".join([*density, f"file {self.sizes['total'] / 1e3:.1f} kB"]))
        for name, value in self.after.items():
            lines.append(f"{name}: {f'{self.before[name]:.4f} -> ' if name in self.before else ''}{value:.4f}")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write ``run.json`` atomically."""
        with atomic_write(Path(folder) / RUN_NAME) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> RunSummary:
        """Read ``run.json``; ValueError if it is damaged or of another version of the package."""
        path = Path(folder) / RUN_NAME
        try:
            return cls(**read_json(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not what a run writes ({error}): delete it, and name the dataset.") from error


def run(arguments: TrainArguments, *, evaluate: bool = True, teacher: FineTuned | None = None) -> RunSummary:
    """Train as the arguments say, and save the adapter in `output_dir`; every process of a distributed run calls this.

    `evaluate=False` skips the evaluations; which images are trained on does not depend on it. A `teacher` is the model
    that the objective ``distillation`` follows, see `convert`.

    Raises:
        ValueError: For arguments, data or a checkpoint that do not go together, before training starts.
        TrainingFailure: If training cannot go on usefully.
        Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once a checkpoint is written.
        FolderInUse: If another run is at work in `output_dir`.
        RuntimeError: If another process of this run failed.
    """
    accelerator = build_accelerator(arguments)
    with claim(arguments.output_dir):
        return _run(accelerator, arguments, evaluate, teacher)


def _run(
    accelerator: Accelerator, arguments: TrainArguments, evaluate: bool = True, teacher: FineTuned | None = None
) -> RunSummary:
    """What [`run`] does in a folder that is its own."""
    together(accelerator, lambda: check_folder(arguments))
    arguments, images = together(accelerator, lambda: images_of_run(arguments))
    if teacher is not None:
        images = replace(images, num_classes=teacher.model.num_classes, classes=teacher.classes)
    task, backbone = together(accelerator, lambda: build_task(arguments, images, accelerator.device, teacher))
    loader = build_train_loader(arguments, images, backbone, accelerator.num_processes, accelerator.process_index)
    facts = {
        **({"start": start_digest(arguments.init_from)} if arguments.init_from is not None else {}),
        **({} if teacher is None else {"teacher": model_digest(teacher.model)}),
        **({"indices": tensor_digest(images.train.rows)} if arguments.indices_file is not None else {}),
        "base": task.base,
        # Labels that the run does not need are known only where something is evaluated.
        "data": (images.train if task.objective.needs_labels else images.train.without_labels()).digest(),
        "preprocessing": backbone.preprocessing,
        "images": None if arguments.streaming else len(images.train),
        "classes": images.classes,
        "head_classes": images.num_classes if task.objective.consumes == "logits" else None,
    }
    tested = images if evaluate else replace(images, bank=None, test=None)
    evaluation = evaluator_of(arguments, tested, backbone, accelerator)
    trainer = Trainer(task, loader, arguments, accelerator, evaluation, facts)
    trainer.train()
    tensors = on_main_process(accelerator, task.saved_tensors(arguments.save_dtype))
    density, main = task.density(), accelerator.is_main_process
    # The other processes see neither the log nor, on another machine, the folder.
    saved = together(accelerator, lambda: _save(trainer, task, tensors, density) if main else None)
    summary = decided(lambda: saved)
    assert summary is not None
    return summary


def check_folder(arguments: TrainArguments) -> None:
    """Refuse an `output_dir` that holds something finished, before anything is loaded."""
    folder, checkpoint = Path(arguments.output_dir), latest_checkpoint(arguments.output_dir)
    finished = (folder / RUN_NAME).is_file()
    if finished and not (arguments.resume and checkpoint):
        what = f"{RUN_NAME} of a finished run{', and no checkpoint' * arguments.resume}"
        raise ValueError(f"{folder} holds {what}: choose another output_dir, or delete it.")
    if (folder / CONFIG_NAME).is_file() and not (finished or checkpoint or (folder / METRICS_NAME).is_file()):
        raise ValueError(f"{folder} holds an adapter ({CONFIG_NAME}) that no run wrote: choose another output_dir.")


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Make an output folder this run's, among all that share the disk; every process of a distributed run calls this.

    What a process left that died is taken over: at once on its own machine, a minute after its last sign of life on
    another.

    Raises:
        FolderInUse: On every process, if another run is at work in it.
        OSError: If the folder cannot be written to.
    """
    path = Path(folder) / ".run.lock"

    def lost(_: Any) -> None:
        warnings.warn(f"{folder} is another run's now: this one gave no sign of life for {LEASE:g} s.", stacklevel=2)
        _thread.interrupt_main()

    lease = SoftFileLease(path, lease_duration=LEASE, on_compromise=lost)

    def holder() -> str | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            silent = time.time() - path.stat().st_mtime if path.exists() else 0.0
            lease.acquire(timeout=1.2 * LEASE if silent > LEASE else 0)
        except Timeout:
            owner = lease.owner
            return "another run" if owner is None else f"process {owner.pid} on {owner.hostname}"
        except OSError as error:
            text = f"Cannot write into output_dir={folder}: {error.strerror}. Name another."
            raise OSError(error.errno, text) from error
        return None

    if (other := decided(holder)) is not None:
        fix = "wait for it, stop it, or choose another output_dir"
        raise FolderInUse(f"{folder} is in use by {other}: {fix}.")
    try:
        yield
    finally:
        lease.release()


def _save(trainer: Trainer, task: TrainingTask, tensors: dict[str, Tensor], density: float | None) -> RunSummary:
    """Save what was trained, and only then the summary, which says that the run is finished."""
    folder, model = Path(trainer.arguments.output_dir), task.model
    if isinstance(model, PeftModel):  # save_embedding_layers="auto" asks the Hub
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=tensors)
        for path in folder.glob("adapter_*"):
            to_disk(path)
        sizes = {"total": (folder / WEIGHTS_NAME).stat().st_size}
    else:
        with atomic_write(folder / MODEL_NAME) as file:
            file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        sizes = {"total": (folder / MODEL_NAME).stat().st_size}
    if task.mask_config is not None:
        sizes = vars(adapter_sizes(folder))
    sizes["full"] = full_bytes(model)
    to_disk(folder)
    lines = read_metrics(folder / METRICS_NAME)
    losses = [line for line in lines if "loss" in line]
    # Not an earlier session's, of other images perhaps.
    after: dict[str, Any] = next((line for line in reversed(trainer.history) if "knn" in line), {})
    alike = (line for line in lines if line.get("evaluation") == after.get("evaluation", "") and line["step"] == 0)
    summary = RunSummary(
        arguments=trainer.facts,
        before={name: value for name, value in next(alike, {}).items() if name in METRICS},
        after={name: value for name, value in after.items() if name in METRICS},
        loss=losses[-1]["loss"] if losses else None,
        density=density,
        steps=trainer.step,
        seconds=trainer.seconds,
        images_per_second=statistics.median(line["images_per_second"] for line in losses) if losses else None,
        sizes=sizes,
        versions={name: library_versions()[name] for name in ("smn_peft", "torch")},
        waiting_for_data=statistics.median(line["waiting_for_data"] for line in losses) if losses else None,
        best_step=trainer.best_step,
    )
    summary.save(folder)
    if task.mask_config is not None:
        write_card(folder)
    return summary


def finished_run(arguments: TrainArguments, **more: Any) -> RunSummary | None:
    """Summary of the finished run in `output_dir`, or None; ValueError if its arguments or facts `more` are others."""
    path = Path(arguments.output_dir) / RUN_NAME
    if not path.is_file():
        return None
    summary, wanted = RunSummary.load(path.parent), as_facts(arguments, more)
    check_same({name: value for name, value in summary.arguments.items() if name in wanted}, wanted, path)
    return summary


def plan(arguments: TrainArguments) -> str:
    """Describe what a run would do, by building all of it and trying one batch without training; raises as [`run`]."""
    arguments, images = images_of_run(arguments)
    task, backbone = build_task(arguments, images)
    loader = build_train_loader(arguments, images, backbone, 1, 0)
    steps = arguments.max_steps or arguments.epochs * steps_per_epoch(loader, arguments)
    task.objective.begin(steps)
    task.objective.before_step(0)
    loader.set_epoch(0)
    with torch.no_grad():
        loss = float(task.train()(next(iter(loader)))["loss"])
    scores = sum(parameter.numel() for _, parameter, adapted in task.trainable() if adapted)
    others = sum(parameter.numel() for _, parameter, adapted in task.trainable() if not adapted)
    tested = "none" if images.test is None else f"{len(images.test)} of {images.test.name} ({images.test.split})"
    number = f"{images.train.num_shards} shards" if arguments.streaming else f"{len(images.train)} images"
    rates = f"learning rates {arguments.lr:g} and {arguments.head_lr:g}"
    lines = {
        "backbone": f"{backbone.name}, {backbone.image_size} px, {backbone.feature_dim} features",
        "training": f"{number} of {images.train.name} ({images.train.split})",
        "evaluation": tested,
        "objective": f"{task.objective.name}, loss of the first batch {loss:.3f}",
        "trainable": f"{scores:,} {'scores' if task.mask_config else 'weights'}, {others:,} others",
        "schedule": f"{steps} steps of {arguments.batch_size} images, {rates}",
        "output": arguments.output_dir,
    }
    return "\n".join(f"{name:10}  {line}" for name, line in lines.items())


def run_many(tasks: Mapping[str, TrainArguments]) -> Iterator[tuple[str, RunSummary | Exception]]:
    """Train the tasks in turn in this process, and yield the name and the summary or error of each when it is done.

    A finished task is not trained again, an interrupted one resumes, one that another run is at work on is left to it
    ([`FolderInUse`]), and one that fails does not stop the others: jobs that share a disk share the tasks.
    Tasks that follow one another with `cache_images` on the same images share them decoded, and the frozen base's
    features of them.

    Raises:
        ValueError: If two tasks share a folder, or differ in precision or device: nothing is trained then.
        RuntimeError: With several processes, if a task fails other than by its training, which all see alike.
        Interrupted: After Ctrl-C, once a checkpoint is written.
    """
    check_tasks(tasks)
    with share():
        for name, arguments in tasks.items():
            arguments = replace(arguments, resume=True)
            try:
                accelerator = build_accelerator(arguments)
                with claim(arguments.output_dir):
                    summary = decided(partial(finished_run, arguments)) or _run(accelerator, arguments)
                yield name, summary
            except EXPECTED as error:
                alike = isinstance(error, TrainingFailure | FolderInUse)
                if PartialState().num_processes > 1 and not alike:
                    raise RuntimeError(f"{name}: {error}") from error
                yield name, error


def check_tasks(tasks: Mapping[str, TrainArguments]) -> None:
    """Refuse tasks that one process cannot train one after the other; raises ValueError as [`run_many`]."""
    folders: dict[str, str] = {}
    first = next(iter(tasks.values()), None)
    for name, arguments in tasks.items():
        if (other := folders.setdefault(arguments.output_dir, name)) != name:
            raise ValueError(f"Tasks {other!r} and {name!r} have the same output_dir: {arguments.output_dir}.")
        for key in ("mixed_precision", "cpu"):
            if getattr(arguments, key) != getattr(first, key):
                raise ValueError(f"Task {name!r} has another {key} than the first: put it into a file of its own.")
