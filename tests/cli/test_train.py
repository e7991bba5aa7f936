# SPDX-License-Identifier: Apache-2.0
"""`smn train`: options and recipes, mistakes, Ctrl-C, kill and resume, and two processes that train as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from smn_peft.cli import app
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.metrics import read_metrics
from smn_peft.training.run import RunSummary
from smn_peft.training.saved import arguments_of, load_run
from tests.training.tiny import SWAV, TRAIN, base_of, environment, smn, write_model, write_npz

runner = CliRunner()


RECIPE = """
description: A tiny run.
batch_size: 12
lr: 5
head_lr: 0.1
knn_k: 5
log_every: 1
cpu: true
eval_split: null
supervised: {jitter_probability: 0.0, grayscale: 0.0, solarize: 0.0}
mask: {batch_norm: adapt}
"""


@pytest.fixture
def recipe(tmp_path) -> list[str]:
    """What comes before the options of a test: a tiny model, data set and recipe."""
    text = f"dataset: {write_npz(tmp_path / 'set.npz')}\n"
    (tmp_path / "tiny.yaml").write_text(text + f"output_dir: {tmp_path / 'out'}\n" + RECIPE)
    return ["--recipe", str(tmp_path / "tiny.yaml"), "--backbone", write_model(tmp_path)]


@pytest.fixture
def swav_recipe(recipe, tmp_path) -> list[str]:
    with (tmp_path / "tiny.yaml").open("a") as file:
        file.write("\n".join(f"{key}: {json.dumps(value)}" for key, value in SWAV.items()))
    return recipe


def train(*words: object, code: int = 0):
    result = runner.invoke(app, ["train", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_a_recipe_and_what_the_line_changes(recipe, tmp_path):
    line = [*recipe, "--epochs", 1, "--lr", 2.5, "--mask.target-modules", "conv1", "--mask.target-modules", "conv2"]
    result = train(*line, "--eval-split", "test", "--objective-options", "label_smoothing=0.1")
    arguments = arguments_of(RunSummary.load(tmp_path / "out"), recipe[-1])
    assert (arguments.lr, arguments.epochs, arguments.batch_size) == (2.5, 1, 12)
    assert arguments.mask.target_modules == {"conv1", "conv2"}
    assert arguments.mask.batch_norm == "adapt"
    assert arguments.objective_options == {"label_smoothing": 0.1}
    assert f"{TRAIN // 12} steps in" in result.stdout
    assert "knn: 0." in result.stdout


def test_a_run_that_finds_nothing_to_resume_says_so(recipe, tmp_path):
    said = f"{tmp_path / 'out'} holds no checkpoint to resume: the run starts at step 0."
    assert said in train(*recipe, "--max-steps", 1, "--resume").stderr
    assert said not in train(*recipe, "--max-steps", 1, "--resume").stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe, tmp_path):
    text = train(*recipe, "--dry-run", "--epochs", 3).stdout
    for part in ("16 features", f"{TRAIN} images of", "12 steps of 12 images", "evaluation  none"):
        assert part in text
    assert not (tmp_path / "out").exists()
    assert "batch_size=12 does not divide" in train(*recipe, "--dry-run", "--accumulate", 5, code=1).stderr


def masks_after_two_steps(folder) -> dict[str, torch.Tensor]:
    _, loaded = load_run(folder, backbone=base_of(folder.parent))
    return loaded.model.masks()


TOPK = ["--mask.mask-type", "topk", "--mask.density", 0.5, "--lr", 0.05, "--mask.init-score", "kaiming_uniform"]


@pytest.mark.parametrize(
    ("words", "density"),
    [
        ([*TOPK, "--mask.rank-by", "absolute", "--mask.density-schedule", "linear"], (0.5, 0.5)),
        (["--lr", 1e4, "--mask.trainable-fraction", 0.1, "--mask.select", "magnitude"], (0.9, 0.99)),
        (["--lr", 1e3, "--mask.init-score", 0.5, "--mask.threshold", -0.5, "--no-mask.scale"], (0.2, 0.999)),
    ],
    ids=["topk", "magnitude", "unscaled"],
)
def test_kinds_of_masks_from_the_line(recipe, tmp_path, words, density):
    train(*recipe, "--max-steps", 2, *words)
    low, high = density
    active = {name: float(mask.float().mean()) for name, mask in masks_after_two_steps(tmp_path / "out").items()}
    assert len(active) == 13  # every convolution, the stem's and the shortcuts' too
    assert all(value >= low - 2e-3 for value in active.values()), active
    assert sum(active.values()) / len(active) <= high + 2e-3


def test_first_stages_from_the_line(recipe, tmp_path):
    train(*recipe, "--max-steps", 2, "--mask-stages", 2)
    masks = masks_after_two_steps(tmp_path / "out")
    assert {name.split(".")[1] for name in masks} == {"layer1", "layer2"}
    assert "give one of them" in train(*recipe, "--mask-stages", 2, "--mask.layers-to-transform", 1, code=1).stderr


def test_lora_and_statistics_from_the_line(recipe, tmp_path):
    line = [*recipe, "--max-steps", 2, "--mask.batch-norm", "frozen"]
    train(*line, "--adapt", "lora", "--peft", "r=2", "--output-dir", tmp_path / "lora")
    assert any("lora_A" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    train(*line, "--adapt", "statistics", "--output-dir", tmp_path / "statistics")
    assert (tmp_path / "statistics" / "model.safetensors").exists()


def test_mistakes_on_the_line(recipe):
    for words, code, message in (
        (["--epoch", 3], 2, "'--epochs'"),
        (["--num_processes", 2], 2, "need --launch"),
        (["--adapt", "lor"], 1, "got 'lor'. Did you mean lora?"),
        (["--optimizer", "adam"], 2, "must be sgd|adamw; got 'adam'"),
        (["--lr", "fast"], 2, "must be float; got 'fast'"),
        (["--part", "1/2"], 2, "it is a share of --tasks"),
        (["--dataset", "cifar1000"], 1, "Did you mean cifar100"),
        (["--objective", "swaw"], 1, "Did you mean"),
    ):
        said = train(*recipe, *words, code=code).stderr
        assert message in said
        assert said.count("\n") == 1
    assert "Did you mean swav-resnet?" in train("--recipe", "swav-resne", code=1).stderr
    assert "dataset is missing: name one" in train("--backbone", "resnet18", code=1).stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epohcs: 3", "'epohcs'. Did you mean epochs?"),
        ("lr: fast", "lr must be float; got 'fast'."),
        ("mask: {density: [1]}", "mask.density must be float or none; got [1]."),
        ("mask: 3", "mask has values of its own, such as mask: {…}; got 3."),
        ("- 3", "is not a YAML file"),
        ("epochs: 0", "epochs must be at least 1; got 0."),
    ],
)
def test_mistakes_in_a_recipe(recipe, tmp_path, line, message):
    text = (tmp_path / "tiny.yaml").read_text()
    kept = [old for old in text.splitlines() if line.partition(":")[0] != old.partition(":")[0]]
    (tmp_path / "tiny.yaml").write_text("\n".join([*kept, line]))
    assert message in train(*recipe, code=1).stderr


def wait_for_step(folder, step):
    deadline = time.monotonic() + 200
    while not any(int(path.name.partition("-")[2]) >= step for path in list_checkpoints(folder)):
        assert time.monotonic() < deadline, "the run made no checkpoint"
        time.sleep(0.01)


def interrupted(line, folder, send, step=2):
    """Start a run in a session of its own, and send all of it a signal after a step; returns (process, stderr)."""
    command = [sys.executable, "-m", "smn_peft.cli", "train", *map(str, line)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)
    wait_for_step(folder, step)
    os.killpg(process.pid, send)
    return process, process.communicate(timeout=120)[1]


def test_ctrl_c_ends_with_130_and_a_checkpoint(recipe, tmp_path):
    def press():
        wait_for_step(tmp_path / "out", 2)
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=press)
    user.start()
    result = train(*recipe, "--epochs", 2000, "--checkpoint-every", 1, code=130)
    user.join()
    (newest,) = list_checkpoints(tmp_path / "out")
    assert f"{newest.name} is whole: go on with resume" in result.stderr


@pytest.mark.parametrize("send", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_workers_too_leaves_a_checkpoint(recipe, tmp_path, send):
    line = [*recipe, "--epochs", 2000, "--checkpoint-every", 1, "--num-workers", 2]
    stopped, said = interrupted(line, tmp_path / "out", send)
    assert stopped.returncode == 130
    (newest,) = list_checkpoints(tmp_path / "out")
    assert f"{newest.name} is whole: go on with resume" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "send"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_to_the_launcher_alone_reaches_the_processes(recipe, tmp_path, processes, send):
    line = ["--launch", "--num_processes", processes, "--main_process_port", 0, *recipe, "--epochs", 2000]
    stopped, said = interrupted([*line, "--checkpoint-every", 1, "--num-workers", 1], tmp_path / "out", send)
    assert stopped.returncode == 130
    (newest,) = list_checkpoints(tmp_path / "out")
    assert f"{newest.name} is whole: go on with resume" in said


@pytest.mark.slow
def test_ctrl_c_on_two_processes(recipe, tmp_path):
    line = ["--launch", "--num_processes", 2, "--main_process_port", 0, *recipe, "--epochs", 2000]
    stopped, said = interrupted([*line, "--checkpoint-every", 1], tmp_path / "out", signal.SIGINT)
    assert stopped.returncode == 130
    (newest,) = list_checkpoints(tmp_path / "out")
    assert f"{newest.name} is whole: go on with resume" in said


@pytest.mark.slow
def test_ctrl_c_kill_and_resume_end_where_an_uninterrupted_run_does(recipe, tmp_path):
    line = [*recipe, "--epochs", 30, "--checkpoint-every", 1, "--output-dir", tmp_path / "parts", "--resume"]
    killed, _ = interrupted(line, tmp_path / "parts", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    stopped, said = interrupted(line, tmp_path / "parts", signal.SIGINT, step=10)
    assert stopped.returncode == 130
    (newest,) = list_checkpoints(tmp_path / "parts")
    assert f"{newest.name} is whole: go on with resume" in said
    assert "Traceback" not in said
    assert not (tmp_path / "parts" / "run.json").exists()
    refused = train(*line[:-1], code=1).stderr
    assert f"holds {newest.name} of an earlier run: pass resume" in refused
    other = train(*line, "--lr", 6, "--mask.batch-norm", "frozen", code=1).stderr
    assert "lr: was 5.0, is 6.0" in other
    assert "mask: was" in other
    torch.set_num_threads(1)
    train(*line)
    train(*recipe, "--epochs", 30, "--output-dir", tmp_path / "whole")
    parts, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert [name for name in parts if not torch.equal(parts[name], whole[name])] == []
    losses = [[x.get("loss") for x in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("parts", "whole")]
    assert losses[0] == losses[1]


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    return smn("train", "--launch", "--num_processes", 2, "--main_process_port", 0, *words)


def compare_with_one_process(line, tmp_path, loss_tolerance, score_tolerance):
    train(*line, "--output-dir", tmp_path / "one")
    done = launch(*line, "--output-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps in") == 1  # one of the two speaks
    curves = [
        [entry["loss"] for entry in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in entry]
        for name in ("one", "two")
    ]
    assert len(curves[0]) == len(curves[1])
    torch.testing.assert_close(*map(torch.tensor, curves), atol=loss_tolerance, rtol=0)
    one, two = (load_file(list_checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    bits = wrong = 0
    for name in one:
        if "smn_scores" in name:
            torch.testing.assert_close(one[name], two[name], atol=score_tolerance, rtol=score_tolerance)
            bits += one[name].numel()
            wrong += int(((one[name] > 0) != (two[name] > 0)).sum())
        elif one[name].is_floating_point():
            torch.testing.assert_close(one[name], two[name], atol=10 * score_tolerance, rtol=10 * score_tolerance)
    assert bits > 20_000
    assert sum(int((one[name] <= 0).sum()) for name in one if "smn_scores" in name) > 10  # the mask is one
    assert wrong / bits < 1e-4


@pytest.mark.slow
def test_two_processes_are_one(recipe, tmp_path):
    # Where there is no GPU nobody has to say so.
    unsaid = [] if torch.accelerator.is_available() else ["--no-cpu"]
    compare_with_one_process([*recipe, *unsaid, "--epochs", 3], tmp_path, 1e-4, 1e-3)


FSDP = "{compute_environment: LOCAL_MACHINE, distributed_type: FSDP, fsdp_config: {fsdp_version: 2}, num_processes: 2}"


@pytest.mark.parametrize(
    ("cpu", "engine"), [(True, []), (False, []), (True, ["--use_fsdp"]), (True, ["--config_file", "fsdp.yaml"])]
)
def test_what_is_launched(monkeypatch, recipe, tmp_path, cpu, engine):
    """`accelerate launch` gets its own options first, and the processes know whether they stay on the CPU."""
    started = []

    class Process:
        pid = 0

        def __init__(self, line, env, start_new_session):
            started.append((line, env.get("ACCELERATE_USE_CPU"), env["KEPT"], start_new_session))

        def wait(self):
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: not cpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    words = ["train", "--launch", *engine, "--num_processes", "2", *recipe, "--no-cpu", "--lr", "3"]
    monkeypatch.setattr(sys, "argv", ["smn", *words])
    assert runner.invoke(app, words).exit_code == 3
    ((line, on_cpu, kept, own_session),) = started
    module = line.index("-m")
    assert line[3:module] == [*(["--multi_gpu"] if cpu and not engine else []), *engine, "--num_processes", "2"]
    assert line[module:] == ["-m", "smn_peft.cli", "train", *recipe, "--no-cpu", "--lr", "3"]
    assert (on_cpu, kept, own_session) == ("true" if cpu else None, "1", True)


@pytest.mark.slow
def test_fsdp_is_not_forgotten(recipe, tmp_path):
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    for words in (["--use_fsdp", "--fsdp_version", 2], ["--config_file", tmp_path / "fsdp.yaml"]):
        done = launch(*words, *recipe)
        assert done.returncode == 1
        assert "FSDP was asked for, and accelerate has none on cpu" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_are_one_without_labels(swav_recipe, tmp_path):
    compare_with_one_process([*swav_recipe, "--epochs", 3], tmp_path, 1e-3, 1e-2)


@pytest.mark.slow
def test_one_process_that_fails_ends_all(recipe, tmp_path):
    # Of the first batch one half has the image that is cut off: only one process reads it.
    write_npz(tmp_path / "set.npz", broken=17)
    started = time.monotonic()
    done = launch(*recipe, "--epochs", 1)
    assert done.returncode != 0
    assert "set.npz, row 17: cannot be read as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 90
    refused = launch(*recipe, "--batch-size", 11)
    assert refused.returncode == 1
    assert "does not divide into 2 processes" in refused.stderr
    assert "Traceback" not in refused.stderr
