# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: one loop over accelerate for every objective, on one process or many, that resumes exactly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply, send_to_device, set_seed
from tqdm import tqdm

from ..tuner import round_extras
from .arguments import LoopArguments, as_facts, check_same
from .checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from .guards import CollapseWatch, StopRequest, check_loss, check_masks
from .metrics import MetricsLog, Window, postfix
from .optimizer import build_optimizer, cast_scores, warmup_cosine
from .processes import agree_on_start, build_accelerator, synchronise_batch_norm, together
from .task import TrainingTask, enable_gradient_checkpointing

_ASK_EVERY = 10  # steps between two checks on a GPU whether any process was told to stop, since each one waits for it
Evaluate = Callable[[TrainingTask], Mapping[str, Any]]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and left a checkpoint."""


class Trainer:
    """Trains a task on batches; the same batches in the same order give the same mask on 1 and on N processes.

    Args:
        task: Model and objective.
        loader: From `smn_peft.data.build_loader`, which gives each process its share of every batch.
        arguments: How to train.
        accelerator: Created from the arguments if None.
        evaluate: Called before, after and every `evaluate_every` epochs; returns what to log.
        facts: What else must be equal on resuming (dataset, backbone …), JSON-compatible.

    Attributes:
        step: Optimizer steps done.
        history: Lines of metrics.jsonl that this session wrote.

    Raises:
        ValueError: If there is nothing to train, or what is in `output_dir` does not go with the arguments.
    """

    def __init__(
        self,
        task: TrainingTask,
        loader: Any,
        arguments: LoopArguments,
        accelerator: Accelerator | None = None,
        evaluate: Evaluate | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.arguments, self.loader, self.evaluate = task, arguments, loader, evaluate
        self.accelerator = accelerator or build_accelerator(arguments)
        self.facts = as_facts(arguments, facts)
        set_seed(arguments.seed)
        if arguments.gradient_checkpointing:
            enable_gradient_checkpointing(task.model)
        task.to(self.accelerator.device)
        if arguments.channels_last:
            task.to(memory_format=torch.channels_last)
        if self.accelerator.num_processes > 1 and arguments.sync_batch_norm:
            synchronise_batch_norm(task)
        if arguments.score_dtype == "bfloat16":
            if task.mask_config is None:
                raise ValueError("score_dtype='bfloat16' is of a mask's scores: use it with adapt='mask'.")
            cast_scores(task, torch.bfloat16)
        self.optimizer = build_optimizer(task, arguments)
        self.steps_per_epoch = len(loader) // arguments.accumulate
        if self.steps_per_epoch == 0:
            raise ValueError(f"An epoch has only {len(loader)} batches: lower accumulate={arguments.accumulate}.")
        self.total_steps = arguments.max_steps or arguments.epochs * self.steps_per_epoch
        warmup, epochs = arguments.warmup_epochs, self.total_steps / self.steps_per_epoch
        if self.accelerator.is_main_process and warmup >= epochs:
            text = f"warmup_epochs={warmup:g} is the whole run of {epochs:g} epochs: its learning rate only rises."
            warnings.warn(f"{text} Shorten the warm-up, or train longer.", stacklevel=2)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._earlier, self._started = 0.0, time.perf_counter()
        self._loss = torch.zeros(())
        self._watch = CollapseWatch(self.steps_per_epoch, verbose=self.accelerator.is_main_process)
        task.objective.begin(self.total_steps)
        found = latest_checkpoint(arguments.output_dir)
        agree_on_start(self.accelerator, found, self.facts)
        if found is not None and not arguments.resume:
            fix = "pass resume to go on from it, choose another output_dir, or delete it"
            raise ValueError(f"{arguments.output_dir} holds {found.name} of an earlier run: {fix}.")
        if arguments.compile:
            task.compile()
        self._wrapped, self._optimizer = self.accelerator.prepare(task, self.optimizer)
        if found is not None:  # after wrapping, which creates the scaler of fp16
            together(self.accelerator, lambda: self._resume(found))
        self.log = MetricsLog(arguments.output_dir, self.step) if self.accelerator.is_main_process else None
        if arguments.log_with is not None:
            self.accelerator.init_trackers("smn_peft", config={k: str(v) for k, v in self.facts.items()})

    def train(self) -> list[dict[str, Any]]:
        """Train to the end and return `history`.

        Raises:
            TrainingFailure: If the loss is not finite, a mask is empty, or a collapse lasts.
            Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once a checkpoint of the last whole step is written.
        """
        self._started = time.perf_counter()
        if self.step == 0 and self.evaluate is not None:
            # The evaluation can take minutes: a batch that does not fit is reported before it.
            self.loader.set_epoch(0)
            with torch.no_grad(), self.accelerator.autocast():
                self.task.eval()(self._on_device(next(iter(self.loader))))
            self._evaluate()
        shown = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc=self.task.objective.name,
            disable=None if self.accelerator.is_main_process else True,
        )
        with StopRequest() as stop, shown as bar:
            while self.step < self.total_steps:
                self._epoch(bar, stop)
        self.task.set_progress(1.0)  # for a run that is resumed at its end
        if self.task.mask_config is not None:
            round_extras(self.task.model)  # as saving will, so that what is evaluated is what is saved
        if self.arguments.score_dtype == "bfloat16":
            cast_scores(self.task, torch.float32)  # no mask changes
        self._evaluate()
        if self.arguments.log_with is not None:
            self.accelerator.end_training()
        return self.history

    def _epoch(self, bar: Any, stop: StopRequest) -> None:
        arguments, done = self.arguments, self.step % self.steps_per_epoch
        self.loader.set_epoch(self.step // self.steps_per_epoch, start_batch=done * arguments.accumulate)
        window = Window(self.accelerator)
        with window.waiting():  # workers start here
            batches = iter(self.loader)
        self._wrapped.train()
        while self.step < self.total_steps and done < self.steps_per_epoch:
            self._one_step(batches, window)
            done += 1
            bar.update()
            if self.step % arguments.log_every == 0 or self.step == self.total_steps:
                self._log(window, bar)
                window = Window(self.accelerator)
            every = arguments.checkpoint_every
            if every is not None and self.step % every == 0:
                self.save()
            if self._stop(stop):
                path = self.save()
                where = f"{path} is whole: go on with resume" if path else "No checkpoint was asked for"
                raise Interrupted(f"Stopped after step {self.step} of {self.total_steps}. {where}.")
        if arguments.checkpoint_every is None or self.step == self.total_steps:
            self.save()
        epoch, every = self.step // self.steps_per_epoch, arguments.evaluate_every
        if every is not None and epoch % every == 0 and self.step < self.total_steps:
            self._evaluate()

    def _one_step(self, batches: Any, window: Window) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        unit = self.steps_per_epoch if arguments.schedule_every == "epoch" else 1
        warmup = arguments.warmup_epochs * self.steps_per_epoch / unit
        factor = warmup_cosine(self.step // unit, self.total_steps / unit, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # Seeded per step, so that a resumed run draws what the uninterrupted one does.
        seed = np.random.SeedSequence([arguments.seed, self.step, accelerator.process_index])
        set_seed(int(seed.generate_state(1)[0]))
        self.task.before_step(self.step, self.step / max(1, self.total_steps - 1))
        losses = []
        for _ in range(arguments.accumulate):
            with window.waiting():
                batch = self._on_device(next(batches))
            with accelerator.accumulate(self._wrapped):
                outputs = self._wrapped(batch)
                accelerator.backward(outputs["loss"])
            window.add(outputs, len(batch["index"]))
            losses.append(outputs["loss"].detach())
        self._loss = torch.stack(losses)
        if accelerator.device.type == "cpu":  # elsewhere this would wait for the device: see _log and save
            check_loss(self.task, self._loss, self.step)
        self.task.objective.after_backward(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def _on_device(self, batch: Any) -> Any:
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        if not self.arguments.channels_last:
            return batch
        last = torch.channels_last
        return recursively_apply(lambda tensor: tensor.to(memory_format=last) if tensor.ndim == 4 else tensor, batch)

    def _stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.requested
        if self.accelerator.device.type != "cpu" and self.step % _ASK_EVERY and self.step < self.total_steps:
            return False
        if stop.requested:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def _resume(self, path: Path) -> None:
        check_same(read_state(path)["facts"], self.facts, path)
        state = load_checkpoint(path, self.task.training_state(), self.optimizer)
        self.step, self._earlier = state["step"], state["seconds"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def save(self) -> Path | None:
        """Write a checkpoint of this step, unless it exists; every process takes part, the main one writes.

        Raises:
            TrainingFailure: If there is nothing to go on from: a loss or what trains is not finite, a mask is empty.
        """
        if self.arguments.keep_checkpoints < 1:
            return None
        path = Path(self.arguments.output_dir) / f"checkpoint-{self.step}"
        check_loss(self.task, self._loss, self.step)
        check_masks(self.task, self.step)  # scores that are NaN count as off, and the loss stays finite

        def write() -> None:
            if not self.accelerator.is_main_process or latest_checkpoint(path.parent) == path:
                return
            scaler = self.accelerator.scaler
            state = {
                "facts": self.facts,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "seconds": self.seconds,
            }
            tensors, keep = self.task.training_state(), self.arguments.keep_checkpoints
            save_checkpoint(path.parent, self.step, tensors, self.optimizer, state, keep)

        together(self.accelerator, write)
        return path

    @property
    def seconds(self) -> float:
        """Time of the loop, evaluations included, and that of earlier sessions until their last checkpoint."""
        return self._earlier + time.perf_counter() - self._started

    # --- Numbers -----------------------------------------------------------------------------------------------------

    def _log(self, window: Window, bar: Any) -> None:
        check_loss(self.task, self._loss, self.step)
        check_masks(self.task, self.step)
        values = window.summary()
        objective = self.task.objective
        self._watch.record(self.step, objective.collapsed(values), objective.grace_steps)
        values["epoch"] = self.step / self.steps_per_epoch
        values["density"] = self.task.density()
        values.update({f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups})
        bar.set_postfix_str(postfix(values))
        self._write(values)

    def _evaluate(self) -> None:
        if self.evaluate is not None:
            self._write({"epoch": self.step / self.steps_per_epoch, **self.evaluate(self.task)})

    def _write(self, values: Mapping[str, Any]) -> None:
        self.history.append({"step": self.step, **values})
        if self.log is not None:
            self.log.write(self.step, values)
        if self.arguments.log_with is not None:
            self.accelerator.log({key: value for key, value in values.items() if value is not None}, step=self.step)
