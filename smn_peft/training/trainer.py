# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: one loop over accelerate for every objective, on any number of processes, that resumes exactly."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather_object, recursively_apply, send_to_device, set_seed
from tqdm import tqdm
from transformers import TrainerCallback

from ..functional.distributed import overwrite, unsharded
from ..tuner import MaskConfig
from .arguments import LoopArguments, as_facts
from .checkpoint import latest_checkpoint, read_checkpoint, restore, save_checkpoint
from .metrics import MetricsLog, StopRequest, TrainingFailure, Window, check_collapse, check_training
from .processes import (
    agree_on_start,
    build_accelerator,
    check_engine,
    decided,
    is_sharding,
    on_main_process,
    reshard,
    sent_tensors,
    synchronise_batch_norm,
    together,
)
from .task import TrainingTask, build_optimizer, cast_scores, enable_gradient_checkpointing, warmup_cosine

_ASK_EVERY = 10  # steps between two checks on a GPU whether any process was told to stop, since each one waits for it
Evaluate = Callable[[TrainingTask], Mapping[str, Any]]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and left a checkpoint."""


class Trainer:
    """Trains a task on batches; the same batches in the same order give the same mask on 1 and on N processes.

    Args:
        task: Model and objective.
        loader: From `smn_peft.data.build_loader`, which gives each process its share of every batch; or of a stream,
            without a length, whose `state_dict` is kept in checkpoints.
        arguments: How to train.
        accelerator: Created from the arguments if None.
        evaluate: Called before, after and every `evaluate_every` epochs; returns what to log. Under FSDP2 it has to
            go by `TrainingTask.features` and `logits_of`. Where it returns a ``held_out``, training ends in the state
            of which this was highest, the first among equals.
        facts: What else must be equal on resuming (dataset, backbone …), JSON-compatible.

    Attributes:
        step: Optimizer steps done.
        history: Lines of metrics.jsonl that this session wrote.
        best_step: Step of the state with the highest ``held_out`` so far; None if nothing was held out.

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
        check_engine(self.accelerator, arguments)
        self.facts = as_facts(arguments, facts)
        set_seed(arguments.seed)
        if arguments.gradient_checkpointing:
            enable_gradient_checkpointing(task.model)
        if not is_sharding(self.accelerator):  # else each process takes only its part there
            task.to(self.accelerator.device)
        if arguments.channels_last:
            task.to(memory_format=torch.channels_last)
        if self.accelerator.num_processes > 1 and arguments.sync_batch_norm:
            synchronise_batch_norm(task)
        if arguments.score_dtype == "bfloat16":
            if task.mask_config is None:
                raise ValueError("score_dtype='bfloat16' is of a mask's scores: use it with adapt='mask'.")
            cast_scores(task, torch.bfloat16)
        self.optimizer = build_optimizer(task, arguments, will_shard=is_sharding(self.accelerator))
        self.steps_per_epoch = steps_per_epoch(loader, arguments)
        self.total_steps = arguments.max_steps or arguments.epochs * self.steps_per_epoch
        main, epochs = self.accelerator.is_main_process, self.total_steps / self.steps_per_epoch
        if main and (warmup := arguments.warmup_epochs) >= epochs:
            text = f"warmup_epochs={warmup:g} is the whole run of {epochs:g} epochs: its learning rate only rises."
            warnings.warn(f"{text} Shorten the warm-up, or train longer.", stacklevel=2)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best_step: int | None = None
        self._best_value, self._best_state = -math.inf, dict[str, torch.Tensor]()
        self._earlier, self._started = 0.0, time.perf_counter()
        self._loss = torch.zeros(())
        self._collapsed: list[int] = []  # steps of the newest lines in a row that show a collapse
        task.objective.begin(self.total_steps)
        found = agree_on_start(self.accelerator, latest_checkpoint(arguments.output_dir), self.facts)
        if found is not None and not arguments.resume:
            fix = "pass resume to go on from it, choose another output_dir, or delete it"
            raise ValueError(f"{arguments.output_dir} holds {found.name} of an earlier run: {fix}.")
        if arguments.compile:
            task.compile()
        self._wrapped, self._optimizer = self.accelerator.prepare(task, self.optimizer)
        if is_sharding(self.accelerator):
            from torch.distributed.fsdp import register_fsdp_forward_method

            for name in ("features", "logits_of"):
                register_fsdp_forward_method(task, name)
        if found is not None:  # after wrapping, which creates the scaler of fp16
            self._resume(found)
        self.log = MetricsLog(arguments.output_dir, self.step) if main else None
        self.accelerator.init_trackers("smn_peft", config={name: str(value) for name, value in self.facts.items()})

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
        options = {"total": self.total_steps, "initial": self.step, "unit": "step", "desc": self.task.objective.name}
        hidden = not self.accelerator.is_main_process or None  # None: where there is no terminal
        with StopRequest() as stop, tqdm(**options, disable=hidden) as bar:
            while self.step < self.total_steps:
                self._epoch(bar, stop)
        if self.arguments.score_dtype == "bfloat16":
            cast_scores(self.task, torch.float32)  # no mask changes
        self.task.finish(self.total_steps)
        self._evaluate_rounded()
        if self.best_step not in (None, self.step):
            with torch.no_grad():
                for name, tensor in self.task.training_state().items():
                    overwrite(tensor, self._best_state[name])
            self._evaluate_rounded()
            self.save(again=True)  # for a run that starts from this one
        for tracker in self.accelerator.trackers:  # end_training would also end the processes' group
            tracker.finish()
        return self.history

    def _epoch(self, bar: Any, stop: StopRequest) -> None:
        arguments, done = self.arguments, self.step % self.steps_per_epoch
        self.loader.set_epoch(self.step // self.steps_per_epoch, start_batch=done * arguments.accumulate)
        # Not at the end of the epoch, whose checkpoint a resumed run may go on from.
        epoch, every = self.step // self.steps_per_epoch, arguments.evaluate_every
        if every is not None and self.step and not done and epoch % every == 0:
            self._evaluate()
        window = Window(self.accelerator)
        with window.waiting():  # workers start here
            batches = iter(self.loader)
        self._wrapped.train()
        for _ in range(done, min(self.steps_per_epoch, done + self.total_steps - self.step)):
            self._one_step(batches, window)
            bar.update()
            if self.step % arguments.log_every == 0 or self.step == self.total_steps:
                self._log(window, bar)
                window = Window(self.accelerator)
            if arguments.checkpoint_every is not None and self.step % arguments.checkpoint_every == 0:
                self.save()
            if self._stop(stop):
                path = self.save()
                where = f"{path} is whole: go on with resume" if path else "No checkpoint was asked for"
                raise Interrupted(f"Stopped after step {self.step} of {self.total_steps}. {where}.")
        if arguments.checkpoint_every is None or self.step == self.total_steps:
            self.save()

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
        self.task.objective.before_step(self.step)
        self.task.before_step(self.step, self.total_steps)
        losses = []
        for _ in range(arguments.accumulate):
            with window.waiting():
                batch = self._on_device(next(batches))
            with accelerator.accumulate(self._wrapped):
                with accelerator.autocast():  # which accelerate leaves to FSDP2, and that would narrow the scores
                    outputs = self._wrapped(batch)
                accelerator.backward(outputs["loss"])
            window.add(outputs, len(batch["index"]))
            losses.append(outputs["loss"].detach())
        self._loss = torch.stack(losses)
        # On a GPU this would wait for it, and where scores are sharded for the others: there _log and save look.
        alone = accelerator.device.type == "cpu" and not is_sharding(accelerator)
        if alone and not self._loss.isfinite().all():
            check_training(self.task, self._loss, self.step)
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

    def _resume(self, path: Path) -> None:
        """Go on from the main process's checkpoint, which the others need not have on their disks."""
        main = self.accelerator.is_main_process
        state, read = together(self.accelerator, lambda: read_checkpoint(path) if main else ({}, {}))
        state, read = decided(lambda: state), sent_tensors(self.accelerator, read)
        live = self.task.training_state(), self.optimizer
        self._best_state = together(self.accelerator, lambda: restore(path, state, read, *live, self.facts))
        if (positions := state.get("loader")) is not None:
            together(self.accelerator, lambda: self._resume_loader(path, positions))
        self.step, self._earlier = state["step"], state["seconds"]
        if (best := state.get("best")) is not None:
            self.best_step, self._best_value = best["step"], best["value"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _resume_loader(self, path: Path, positions: list[Mapping[str, Any]]) -> None:
        if len(positions) != self.accelerator.num_processes:
            what = f"{path}: {len(positions)} processes read the stream, and now {self.accelerator.num_processes}"
            raise ValueError(f"{what}, so its order would change: resume with as many, or start anew.")
        self.loader.load_state_dict(positions[self.accelerator.process_index])

    def save(self, again: bool = False) -> Path | None:
        """Write a checkpoint of this step, unless it exists; every process takes part, the main one writes.

        Args:
            again: Replace one that exists.

        Raises:
            TrainingFailure: If there is nothing to go on from: a loss or what trains is not finite, a mask is empty.
        """
        if self.arguments.keep_checkpoints < 1:
            return None
        path = Path(self.arguments.output_dir) / f"checkpoint-{self.step}"
        check_training(self.task, self._loss, self.step)
        tensors, moments = on_main_process(self.accelerator, self.task.training_state()), self.optimizer.state_dict()
        moments["state"] = {i: on_main_process(self.accelerator, own) for i, own in moments["state"].items()}
        stateful = hasattr(self.loader, "state_dict")
        positions = {"loader": gather_object([self.loader.state_dict()])} if stateful else {}

        def write() -> None:
            if self.accelerator.is_main_process and (again or latest_checkpoint(path.parent) != path):
                scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
                state = {"facts": self.facts, "scaler": scaler, "seconds": self.seconds, **positions}
                best = None if self.best_step is None else self._best_state
                if best is not None:
                    state["best"] = {"step": self.best_step, "value": self._best_value}
                save_checkpoint(path.parent, self.step, tensors, moments, state, self.arguments.keep_checkpoints, best)

        together(self.accelerator, write)
        return path

    @property
    def seconds(self) -> float:
        """Time of the loop, evaluations included, and that of earlier sessions until their last checkpoint."""
        return self._earlier + time.perf_counter() - self._started

    def _log(self, window: Window, bar: Any) -> None:
        check_training(self.task, self._loss, self.step)
        values, objective = window.summary(), self.task.objective
        problem, main = objective.collapsed(values), self.accelerator.is_main_process
        self._collapsed = [*self._collapsed, self.step] if problem else []
        if problem:
            check_collapse(self._collapsed, problem, self.steps_per_epoch, objective.grace_steps, verbose=main)
        values["density"], values["bits_per_weight"] = self.task.density(), self.task.bits_per_weight()
        values.update({f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups})
        shown = ("loss", "density", "images_per_second", "waiting_for_data")
        bar.set_postfix({name: values[name] for name in shown if values[name] is not None})
        self._write(values)

    def _evaluate_rounded(self) -> None:
        """Evaluate what saving will write."""
        self.task.round(self.arguments.save_dtype)
        try:
            self._evaluate()
        except ValueError as error:  # features of the same images were finite before
            raise TrainingFailure(f"After the last step: {error}") from error

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        values = self.evaluate(self.task)
        if is_sharding(self.accelerator):
            reshard(self.task)
        self._write(values)
        if (value := values.get("held_out", -math.inf)) > self._best_value:
            self.best_step, self._best_value = self.step, value
            state = self.task.training_state().items()
            self._best_state = {name: unsharded(tensor.detach()).to("cpu", copy=True) for name, tensor in state}

    def _write(self, values: Mapping[str, Any]) -> None:
        line = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **values}
        self.history.append(line)
        if self.log is not None:
            self.log.write(line)
        known = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.accelerator.log(known, step=self.step)


def steps_per_epoch(loader: Any, arguments: LoopArguments) -> int:
    """Optimizer steps of an epoch: of the loader's length, or `arguments.steps_per_epoch` where it has none."""
    try:
        batches = len(loader)
    except TypeError:
        if arguments.steps_per_epoch is None:
            raise ValueError("The loader has no length: set steps_per_epoch, the steps of an epoch.") from None
        return arguments.steps_per_epoch
    if batches < arguments.accumulate:
        raise ValueError(f"An epoch has only {batches} batches: lower accumulate={arguments.accumulate}.")
    return batches // arguments.accumulate


class ExactResumeCallback(TrainerCallback):
    """Keep the scores in the checkpoints of transformers' `Trainer`, and out of what is saved after training.

    The `Trainer` writes a checkpoint with `save_pretrained`, which stores one bit per weight, and resumes with
    `load_adapter(is_trainable=True)`, which has to invent the scores: the run continues from the same mask along
    another path. This callback switches ``save_scores`` on while training, so that checkpoints are 32 times larger and
    an interrupted run ends in the same mask. `trainer.save_model()` afterwards exports bits.

    ```python
    trainer = Trainer(model, arguments, callbacks=[ExactResumeCallback()], …)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("adapter")
    ```

    Under FSDP2 the `Trainer` writes an adapter only with `state_dict_type` FULL_STATE_DICT.
    """

    def __init__(self) -> None:
        self._switched: list[MaskConfig] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Switch ``save_scores`` on for every mask adapter that trains.

        Raises:
            ValueError: There is none, or the `Trainer` would write no adapter.
        """
        self.on_train_end()  # of a run that was interrupted
        configs = getattr(kwargs.get("model"), "peft_config", {}).values()
        masks = [config for config in configs if isinstance(config, MaskConfig) and not config.inference_mode]
        if not masks:
            fix = "wrap the model with get_peft_model(model, MaskConfig(…)) first, or leave the callback out"
            raise ValueError(f"ExactResumeCallback found no mask adapter that trains: {fix}.")
        plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None
        if plugin is not None and "FULL" not in str(plugin.state_dict_type):
            fix = "set it to FULL_STATE_DICT, by --fsdp_state_dict_type"
            raise ValueError(f"With state_dict_type={plugin.state_dict_type} the Trainer writes no adapter: {fix}.")
        self._switched = [config for config in masks if not config.save_scores]
        for config in self._switched:
            config.save_scores = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Set ``save_scores`` back."""
        while self._switched:
            self._switched.pop().save_scores = False
