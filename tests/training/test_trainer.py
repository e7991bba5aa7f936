# SPDX-License-Identifier: Apache-2.0
"""The loop: it learns, it resumes to the bit, it keeps the base out of its checkpoints, and it stops loudly."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from smn_peft.training import Interrupted, Trainer, TrainingFailure, TrainingTask
from smn_peft.training import trainer as trainer_module
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.metrics import check_collapse, read_metrics
from tests.processes import context, leave_the_test

from . import helpers
from .helpers import Batches, loop, resnet, small, stop_after, supervised_task, swav_task

TASKS = {"supervised": (supervised_task, 0), "swav": (swav_task, 3)}


def trained(folder, kind="supervised", steps=None, **options):
    """A trainer after `steps` steps (None: all), stopped as Ctrl-C would stop it."""
    make, views = TASKS[kind]
    trainer = Trainer(make(), Batches(views=views), loop(folder, **options))
    if steps is not None:
        stop_after(trainer, steps)
        with pytest.raises(Interrupted):
            trainer.train()
    else:
        trainer.train()
    return trainer


def same(a: TrainingTask, b: TrainingTask) -> bool:
    one, two = a.training_state(), b.training_state()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_learns_and_the_base_stays_as_it_was(tmp_path):
    task = supervised_task()
    frozen = {n: p.detach().clone() for n, p in task.named_parameters() if not p.requires_grad}
    trainer = Trainer(task, Batches(), loop(tmp_path, epochs=6))
    lines = trainer.train()
    losses = [line["loss"] for line in lines]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert all(torch.equal(parameter, frozen[n]) for n, parameter in task.named_parameters() if n in frozen)
    assert lines[-1]["density"] < 1.0
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


@pytest.mark.parametrize("kind", TASKS)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, kind):
    def losses(folder):
        return [line.get("loss") for line in read_metrics(folder / "metrics.jsonl")]

    whole = trained(tmp_path / "whole", kind)
    for steps in (1, 6, 8):
        folder = tmp_path / f"stopped after {steps}"
        trained(folder, kind, steps=steps)
        assert same(whole.task, trained(folder, kind, resume=True).task), steps
        assert losses(folder) == losses(tmp_path / "whole")


def test_two_seeds_differ(tmp_path):
    # Dropped paths are drawn from the run's seed; everything else is the same here.
    runs = [trained(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert not same(runs[0].task, runs[1].task)


def test_adamw_and_accumulation_resume_too(tmp_path):
    options = {"optimizer": "adamw", "lr": 0.05, "accumulate": 2, "batch_size": 16}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", steps=3, **options)
    assert same(whole.task, trained(tmp_path / "parts", resume=True, **options).task)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "lr": 0.05}, {"score_dtype": "bfloat16"}])
def test_channels_last_resumes_too(tmp_path, options):
    # A file has one order, and fused steps walk through parameter and momentum as they lie in memory.
    options = {"channels_last": True, "epochs": 2, **options}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", steps=3, **options)
    assert same(whole.task, trained(tmp_path / "parts", resume=True, **options).task)


def test_accumulated_parts_are_one_batch(tmp_path):
    # Without drop path and batch statistics the sum over parts is the batch's own gradient.
    def run(folder, accumulate, batch_size):
        task = supervised_task(batch_norm="frozen")
        for module in task.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        trainer = Trainer(
            task, Batches(batch_size=batch_size), loop(folder, accumulate=accumulate, epochs=1, max_steps=2)
        )
        trainer.train()
        return trainer.task.training_state()

    one, two = run(tmp_path / "1", 1, 16), run(tmp_path / "2", 2, 8)
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-4) for name in one)


@pytest.mark.parametrize("kind", TASKS)
def test_a_checkpoint_holds_what_moves_and_never_the_base(tmp_path, kind):
    trainer = trained(tmp_path, kind)
    (path,) = list_checkpoints(tmp_path)
    saved = load_file(path / "model.safetensors")
    moved = {name for name, parameter in trainer.task.named_parameters() if parameter.requires_grad}
    assert moved <= set(saved)
    assert not [name for name in saved if ".base_layer." in name or ".original_module." in name]
    statistics = [name for name in saved if "smn_running_mean" in name]
    assert len(statistics) == sum("running_mean" in name for name, _ in resnet().named_buffers())
    assert ("objective.queue" in saved) == (kind == "swav")


def test_settings_that_differ_are_listed_and_refused(tmp_path):
    trained(tmp_path, steps=2)
    with pytest.raises(
        ValueError, match=r"other settings.*\n  lr: was 5\.0, is 6\.0\n  momentum: was 0\.9, is 0\.8\n"
    ):
        trained(tmp_path, resume=True, lr=6.0, momentum=0.8)
    trained(tmp_path, resume=True, log_every=3)  # moves no weight


def test_damaged_facts_of_a_checkpoint_are_named_on_resuming(tmp_path):
    trained(tmp_path, steps=2)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: .*Delete it"):
        trained(tmp_path, resume=True)


def test_seconds_are_of_all_sessions(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: sum(now)))
    for options in ({}, {"resume": True}):
        task = supervised_task()
        task.register_forward_hook(lambda *_: now.append(10.0))
        session = Trainer(task, Batches(), loop(tmp_path, **options))
        if not options:
            stop_after(session, 2)
            with pytest.raises(Interrupted):
                session.train()
    now.append(1000.0)  # between the sessions
    session.train()
    assert session.seconds == 120


def test_a_warmup_of_the_whole_run_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="warmup_epochs=3 is the whole run of 3 epochs"):
        Trainer(supervised_task(), Batches(), loop(tmp_path, warmup_epochs=3))


def test_a_used_folder_is_not_overwritten(tmp_path):
    trained(tmp_path, steps=2)
    with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run: pass resume"):
        trained(tmp_path)


def parameter_of(task, ending):
    return next(p for n, p, _ in task.trainable() if n.endswith(ending))


def test_a_diverging_run_stops_with_step_tensor_and_advice(tmp_path):
    task = supervised_task()
    trainer = Trainer(task, Batches(), loop(tmp_path))

    def poison(step):
        if step == 2:
            next(p for n, p, _ in task.trainable() if n.endswith("head.modules_to_save.default.weight")).data[0] = (
                math.nan
            )

    task.objective.before_step = poison
    name = r"model\.base_model\.model\.head\.modules_to_save\.default\.weight"
    with pytest.raises(TrainingFailure, match=rf"The loss is nan at step 2; {name} and 0 more hold NaN.*Lower lr"):
        trainer.train()
    assert trainer.step == 2


def test_scores_that_are_nan_are_named_though_the_loss_is_finite(tmp_path):
    task = supervised_task()
    trainer = Trainer(task, Batches(), loop(tmp_path))
    parameter_of(task, "layer1.0.conv1.smn_scores.default").data[0] = math.nan
    with pytest.raises(
        TrainingFailure, match=r"layer1\.0\.conv1\.smn_scores\.default .*NaN or infinity at step 1.*Lower lr"
    ):
        trainer.train()


def test_a_part_of_a_batch_that_is_nan_stops_the_run_before_its_step(tmp_path):
    task = supervised_task()
    trainer = Trainer(task, Batches(), loop(tmp_path, accumulate=2, log_every=100, checkpoint_every=1))
    forward, calls = task.objective.forward, []

    def first_of_step_2(model, batch):
        outputs = forward(model, batch)
        calls.append(batch)
        return {**outputs, "loss": outputs["loss"] * math.nan} if len(calls) == 5 else outputs

    task.objective.forward = first_of_step_2
    with pytest.raises(TrainingFailure, match=r"The loss is nan at step 2; every parameter is finite"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("value", [math.nan, -1e6], ids=["nan", "empty"])
def test_no_checkpoint_is_written_of_scores_that_nothing_goes_on_from(tmp_path, value):
    task = supervised_task()
    trainer = Trainer(task, Batches(), loop(tmp_path, log_every=100, checkpoint_every=1))
    scores = parameter_of(task, "layer1.0.conv1.smn_scores.default")
    task.objective.before_step = lambda step: scores.data.fill_(value) if step == 2 else None
    with pytest.raises(TrainingFailure, match=r"layer1\.0\.conv1.* at step 3.*Lower lr"):
        trainer.train()
    (path,) = list_checkpoints(tmp_path)  # the one before stays
    assert path.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_an_empty_mask_stops_the_run_and_names_the_layer(tmp_path):
    task = supervised_task()
    trainer = Trainer(task, Batches(), loop(tmp_path))
    parameter_of(task, "layer1.0.conv1.smn_scores.default").data.fill_(-1e6)
    with pytest.raises(TrainingFailure, match=r"The mask of .*layer1\.0\.conv1\.weight is empty at step 1 .*Lower lr"):
        trainer.train()


def test_a_collapse_that_the_objective_reports_and_that_lasts_stops_the_run(tmp_path):
    make, views = TASKS["swav"]
    trainer = Trainer(make(), Batches(views=views), loop(tmp_path))
    shown = iter([True, False, *[True] * 5])  # the second line breaks the row
    said = lambda logs: f"all codes alike, entropy {logs['codes_entropy']:.1f}." if next(shown) else None  # noqa: E731
    trainer.task.objective.collapsed = said
    with (
        pytest.warns(UserWarning, match=r"Step 3: all codes alike, entropy \d\.\d\. The run is stopped if this lasts"),
        pytest.raises(TrainingFailure, match=r"Step 7, and since step 3: all codes alike, entropy \d"),
    ):
        trainer.train()


def test_a_collapse_that_passes_only_warns():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for last in range(1, 9):  # up to eight lines, but not an epoch
            check_collapse(range(1, last + 1), "alike.", 8, 0)
        for last in range(10, 30):  # the grace
            check_collapse(range(10, last + 1), "alike.", 8, 30)
        check_collapse([1], "alike.", 1, 0, verbose=False)
    shown = [str(warning.message).partition(":")[0] for warning in said]
    assert shown == ["Step 1", "Step 10"]
    with pytest.raises(TrainingFailure, match="Step 30, and since step 10: alike"):
        check_collapse(range(10, 31), "alike.", 8, 30)


def test_a_collapse_has_to_show_in_five_lines():
    check_collapse([1, 11, 21, 31], "alike.", 1, 0)
    with pytest.raises(TrainingFailure, match="Step 41, and since step 1: alike"):
        check_collapse([1, 11, 21, 31, 41], "alike.", 1, 0)


def test_nothing_to_train_is_said(tmp_path):
    task = supervised_task()
    task.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing to train.*get_peft_model"):
        Trainer(task, Batches(), loop(tmp_path))


@pytest.mark.parametrize("options", [{"channels_last": True}, {"mixed_precision": "bf16"}])
def test_options_of_speed_still_learn(tmp_path, options):
    lines = trained(tmp_path, epochs=4, **options).history
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_scores_stay_fp32_under_autocast(tmp_path):
    task = trained(tmp_path, mixed_precision="bf16").task
    assert {p.dtype for n, p, _ in task.trainable()} == {torch.float32}


def test_gradient_checkpointing_changes_no_number(tmp_path):
    plain = trained(tmp_path / "plain")
    saving = trained(tmp_path / "saving", gradient_checkpointing=True)
    one, two = plain.task.training_state(), saving.task.training_state()
    assert sum("smn_running_mean" in name for name in one) > 5
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", TASKS)
def test_a_compiled_run_is_one_graph_and_changes_no_number(tmp_path, monkeypatch, kind):
    torch._dynamo.reset()
    monkeypatch.setattr(helpers, "resnet", small)
    make, views = TASKS[kind]
    monkeypatch.setitem(TASKS, kind, (partial(make, target_modules="all-conv"), views))
    plain = trained(tmp_path / "plain", kind, epochs=1)
    real = TrainingTask.compile
    monkeypatch.setattr(TrainingTask, "compile", lambda task: real(task, backend="aot_eager", fullgraph=True))
    torch._dynamo.utils.counters.clear()
    compiled = trained(tmp_path / "compiled", kind, compile=True, epochs=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, two in zip(plain.history, compiled.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    one, two = plain.task.training_state(), compiled.task.training_state()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_progressive_mask_follows_the_run(tmp_path):
    task = supervised_task(mask_type="topk", density=0.5, density_schedule="linear")
    lines = Trainer(task, Batches(), loop(tmp_path)).train()
    densities = [line["density"] for line in lines]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > 0.95
    assert densities[-1] == pytest.approx(0.5, abs=0.001)  # in the last step, not only after it


def train_and_resume(folder) -> None:
    """What a process does that a test kills."""
    leave_the_test()
    trainer = Trainer(supervised_task(), Batches(), loop(folder, epochs=400, checkpoint_every=1, resume=True))
    try:
        trainer.train()
    except Interrupted as stop:
        (folder / "said").write_text(str(stop))
        sys.exit(130)


def start(folder):
    process = context().Process(target=train_and_resume, args=(folder,))
    process.start()
    return process


def wait_for_step(folder, step):
    deadline = time.monotonic() + 120
    while not any(int(p.name.partition("-")[2]) >= step for p in list_checkpoints(folder)):
        assert time.monotonic() < deadline, "the run made no checkpoint"
        time.sleep(0.01)


def test_kill_9_at_three_points_then_resume_is_the_uninterrupted_run(tmp_path):
    for step in (2, 7, 11):
        process = start(tmp_path / "killed")
        wait_for_step(tmp_path / "killed", step)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (newest,) = list_checkpoints(tmp_path / "killed")[-1:]
    step = int(newest.name.partition("-")[2])
    torch.set_num_threads(1)
    trained(tmp_path / "whole", steps=step, epochs=400)
    whole = load_file(tmp_path / "whole" / newest.name / "model.safetensors")
    killed = load_file(newest / "model.safetensors")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []


def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 3)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    (path,) = list_checkpoints(tmp_path)
    assert f"{path.name} is whole: go on with resume" in (tmp_path / "said").read_text()
