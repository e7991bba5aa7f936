# SPDX-License-Identifier: Apache-2.0
"""`run`: a whole training from its arguments to the saved adapter, with what it was worth before and after."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors.torch import save

from ..data import ImageDataset
from ..hub import RUN_NAME, full_bytes, write_card
from ..storage import CONFIG_NAME, adapter_sizes, atomic_write, read_json, tensor_digest, to_disk
from .accelerator import build_accelerator
from .assemble import build_task, build_train_loader
from .checkpoint import latest_checkpoint
from .evaluator import evaluator_of
from .facts import as_facts, check_same
from .lora import lora_sizes
from .metrics import METRICS_NAME, read_metrics
from .run_lock import run_lock
from .start import start_digest
from .task import TrainingTask
from .together import together
from .train_arguments import TrainArguments
from .trainer import Trainer
from .unlabelled import images_of_run

__all__ = ["MODEL_NAME", "RUN_NAME", "RunSummary", "finished_run", "indices_digest", "plan", "run"]

MODEL_NAME = "model.safetensors"


@dataclass
class RunSummary:
    """What a run was and what came of it; written as ``run.json`` beside the adapter.

    Attributes:
        arguments: The arguments, JSON-compatible.
        before: Evaluation of the frozen base, by metric; of the start where `init_from` gave a model without an
            adapter; empty where the run was resumed with another evaluation.
        after: Evaluation at the end.
        loss: Mean loss of the last logged window.
        density: Fraction of the masked weights that are active, None without a mask.
        steps: Optimizer steps.
        seconds: Time of the training loop in all sessions, evaluations included.
        images_per_second: Median over the logged windows.
        sizes: Bytes of the adapter's file by part; `full` is what a checkpoint of all weights would have.
        versions: Versions of what computed it.
        waiting_for_data: Share of the time in which the loop waited for a batch, median over the logged windows.
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

    def text(self) -> str:
        """What happened, in lines for a terminal."""
        lines = [f"{self.steps} steps in {self.seconds:.0f} s, in {self.arguments['output_dir']}"]
        if self.density is not None:
            lines.append(f"density {self.density:.4f}, file {self.sizes.get('total', 0) / 1e3:.1f} kB")
        for name, value in self.after.items():
            lines.append(f"{name}: {f'{self.before[name]:.4f} -> ' if name in self.before else ''}{value:.4f}")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write ``run.json``, whole or not at all."""
        with atomic_write(Path(folder) / RUN_NAME) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> RunSummary:
        """Read ``run.json``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another version of the package.
        """
        path = Path(folder) / RUN_NAME
        try:
            return cls(**read_json(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not what a run writes ({error}): delete it, and name the dataset.") from error


def run(arguments: TrainArguments, *, evaluate: bool = True) -> RunSummary:
    """Train as the arguments say, and save the adapter in `output_dir`.

    Every process of a distributed run calls this; the main one writes.

    Args:
        arguments: The whole run.
        evaluate: False evaluates nothing; which images are trained on does not depend on it.

    Raises:
        ValueError: For arguments, data or a checkpoint that do not go together, before training starts.
        TrainingFailure: If training cannot go on usefully.
        Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once a checkpoint is written.
        RuntimeError: If another run is at work in `output_dir`, or another process of this one failed.
    """
    accelerator = build_accelerator(arguments)
    together(accelerator, lambda: _check_folder(arguments))
    lock = run_lock(arguments.output_dir) if accelerator.is_main_process else nullcontext()
    with ExitStack() as held:
        together(accelerator, lambda: held.enter_context(lock))
        return _run(arguments, accelerator, evaluate)


def _run(arguments: TrainArguments, accelerator: Accelerator, evaluate: bool) -> RunSummary:
    arguments, images = together(accelerator, lambda: images_of_run(arguments))
    task, backbone = together(accelerator, lambda: build_task(arguments, images, accelerator.device))
    loader = build_train_loader(arguments, images, backbone, accelerator.num_processes, accelerator.process_index)
    facts = {
        **({"start": start_digest(arguments.init_from)} if arguments.init_from is not None else {}),
        **({"indices": indices_digest(images.train)} if arguments.indices_file is not None else {}),
        "base": task.base,
        # Of a run that needs no labels they are known only where something is evaluated.
        "data": (images.train if task.objective.needs_labels else images.train.without_labels()).digest(),
        "preprocessing": backbone.preprocessing,
        "images": len(images.train),
        "classes": images.train.classes,
        "head_classes": images.num_classes if task.objective.consumes == "logits" else None,
    }
    evaluation = evaluator_of(arguments, images, backbone, accelerator) if evaluate else None
    trainer = Trainer(task, loader, arguments, accelerator, evaluation, facts)
    trainer.train()
    # The other processes see neither the log nor, on another machine, the folder.
    found = [together(accelerator, lambda: _saved(trainer, task) if accelerator.is_main_process else None)]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _saved(trainer: Trainer, task: TrainingTask) -> RunSummary:
    """Save what was trained, and only then say that the run is finished."""
    folder = Path(trainer.arguments.output_dir)
    _save_model(task, folder)
    summary = _summary(trainer, task, folder)
    summary.save(folder)
    if task.mask_config is not None:
        write_card(folder)
    return summary


def indices_digest(images: ImageDataset) -> str:
    """Digest of which images of their source these are, by which a run knows its `indices_file` again."""
    return tensor_digest(images.rows)


def finished_run(arguments: TrainArguments, **more: Any) -> RunSummary | None:
    """What a run with these arguments wrote when it was done, None if there is none in `output_dir`.

    Args:
        arguments: The whole run.
        more: Other facts that its ``run.json`` has to have.

    Raises:
        ValueError: If a run with other settings was done there.
    """
    path = Path(arguments.output_dir) / RUN_NAME
    if not path.is_file():
        return None
    summary, wanted = RunSummary.load(path.parent), as_facts(arguments, more)
    check_same({name: summary.arguments.get(name) for name in wanted}, wanted, path)
    return summary


def plan(arguments: TrainArguments) -> str:
    """What a run would do, found out by building all of it and trying one batch without training.

    Raises:
        ValueError: As [`run`].
    """
    arguments, images = images_of_run(arguments)
    task, backbone = build_task(arguments, images)
    loader = build_train_loader(arguments, images, backbone, 1, 0)
    steps = arguments.max_steps or arguments.epochs * (len(loader) // arguments.accumulate)
    task.objective.begin(steps)
    loader.set_epoch(0)
    task.before_step(0, 0.0)
    with torch.no_grad():
        outputs = task.train()(next(iter(loader)))
    scores = sum(parameter.numel() for _, parameter, adapted in task.trainable() if adapted)
    others = sum(parameter.numel() for _, parameter, adapted in task.trainable() if not adapted)
    tested = "none" if images.test is None else f"{len(images.test)} of {images.test.name} ({images.test.split})"
    return "\n".join(
        [
            f"backbone    {backbone.name}, {backbone.image_size} px, {backbone.feature_dim} features",
            f"training    {len(images.train)} images of {images.train.name} ({images.train.split})",
            f"evaluation  {tested}",
            f"objective   {task.objective.name}, loss of the first batch {float(outputs['loss']):.3f}",
            f"trainable   {scores:,} {'scores' if task.mask_config else 'weights'}, {others:,} others",
            f"schedule    {steps} steps of {arguments.batch_size} images, learning rates {arguments.lr:g} and "
            f"{arguments.head_lr:g}",
            f"output      {arguments.output_dir}",
        ]
    )


def _check_folder(arguments: TrainArguments) -> None:
    """Try `output_dir` before anything is loaded, and not at the first checkpoint; a finished run in it stays."""
    folder = Path(arguments.output_dir)
    if (folder / RUN_NAME).is_file() and not (arguments.resume and latest_checkpoint(folder)):
        raise ValueError(
            f"{folder} holds {RUN_NAME} of a finished run{', and no checkpoint' * arguments.resume}: choose another "
            "output_dir, or delete it."
        )
    ours = any((folder / name).is_file() for name in (RUN_NAME, METRICS_NAME)) or latest_checkpoint(folder)
    if (folder / CONFIG_NAME).is_file() and not ours:
        raise ValueError(f"{folder} holds an adapter ({CONFIG_NAME}) that no run wrote: choose another output_dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot write into output_dir={folder}: {error.strerror}. Name another."
        ) from error


def _save_model(task: TrainingTask, folder: Path) -> None:
    if isinstance(task.model, PeftModel):
        task.model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" asks the Hub
        for path in folder.glob("adapter_*"):
            to_disk(path)
        to_disk(folder)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in task.model.state_dict().items()}
    with atomic_write(folder / MODEL_NAME) as file:
        file.write(save(tensors))
    to_disk(folder)


def _summary(trainer: Trainer, task: TrainingTask, folder: Path) -> RunSummary:
    lines = read_metrics(folder / METRICS_NAME)
    losses = [line for line in lines if "loss" in line]
    before = [line for line in lines if "knn" in line and line["step"] == 0 and trainer.comparable]
    after = [line for line in trainer.history if "knn" in line]  # not an earlier session's, of other images perhaps
    sizes: dict[str, int] = {}
    if isinstance(task.model, PeftModel):
        sizes = lora_sizes(folder) if task.mask_config is None else vars(adapter_sizes(folder))
        sizes["full"] = full_bytes(task.model)
    return RunSummary(
        arguments=trainer.facts,
        before=_metrics(before[0]) if before else {},
        after=_metrics(after[-1]) if after else {},
        loss=losses[-1]["loss"] if losses else None,
        density=task.density(),
        steps=trainer.step,
        seconds=trainer.seconds,
        images_per_second=_median(losses, "images_per_second"),
        sizes=sizes,
        versions={"smn_peft": installed_version("smn_peft"), "torch": torch.__version__},
        waiting_for_data=_median(losses, "waiting_for_data"),
    )


def _median(lines: list[dict[str, Any]], name: str) -> float | None:
    return statistics.median(line[name] for line in lines) if lines else None


def _metrics(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: line[name] for name in ("knn", "linear_probe", "accuracy") if name in line}
