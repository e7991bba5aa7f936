# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny images: what they learn and write, and that what is bad is said before they start."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from smn_peft.data.decoding import ImageError
from smn_peft.storage.inspection import inspect_adapter
from smn_peft.training import evaluate_run, run
from smn_peft.training.assemble import load_base
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.metrics import read_metrics
from smn_peft.training.run import RunSummary, plan
from smn_peft.training.saved import arguments_of, load_run

from .tiny import SWAV, TEST, TRAIN, base_of, picture, tiny_arguments, write_clip, write_npz


def scores_of(folder) -> dict[str, torch.Tensor]:
    (path,) = list_checkpoints(folder)
    return load_file(path / "model.safetensors")


def test_a_run_learns_and_says_what_it_did(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=8, head_lr=0.5, eval_probe=True, mask={"batch_norm": "adapt"})
    summary = run(arguments)
    assert summary.steps == 8 * TRAIN // 12
    assert summary.before.keys() == summary.after.keys() == {"knn", "linear_probe", "accuracy"}
    assert summary.after["accuracy"] > max(0.8, summary.before["accuracy"] + 0.2)
    assert 0.5 < summary.density < 1
    assert summary.sizes["total"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert f"{summary.steps} steps in" in summary.text()
    assert f"accuracy: {summary.before['accuracy']:.4f} -> {summary.after['accuracy']:.4f}" in summary.text()


@pytest.mark.filterwarnings("error:.*rounded to bfloat16")
def test_a_run_saves_coded_and_what_it_evaluates_is_what_it_saves(tmp_path):
    mask = {"batch_norm": "adapt", "codec": "entropy", "save_dtype": "bfloat16"}
    summary = run(tiny_arguments(tmp_path, epochs=2, head_lr=0.5, mask=mask))
    folder = tmp_path / "out"
    assert inspect_adapter(folder).codec == "entropy"
    saved = {key: tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.uint8, torch.bfloat16, torch.int64}
    reports = {
        report.metric: report.value
        for report in evaluate_run(folder, backbone=base_of(tmp_path), metrics=["accuracy"])
    }
    assert reports["accuracy"] == summary.after["accuracy"]


@pytest.mark.parametrize("head", ["trained", "probe", "masked"])
def test_run_json_is_the_run(tmp_path, head):
    arguments = tiny_arguments(
        tmp_path,
        head=head,
        max_steps=1,
        mask={"target_modules": ["conv1", "conv2"]},
        supervised={"jitter": (0.1, 0, 0, 0)},
    )
    summary = run(arguments)
    loaded = RunSummary.load(tmp_path / "out")
    assert loaded == summary
    assert 0 <= summary.waiting_for_data <= 1
    old = json.loads((tmp_path / "out" / "run.json").read_text())
    del old["waiting_for_data"]  # as it was written before there was one
    (tmp_path / "out" / "run.json").write_text(json.dumps(old))
    assert RunSummary.load(tmp_path / "out").waiting_for_data is None
    assert arguments_of(loaded, arguments.backbone) == arguments
    assert loaded.arguments["classes"] == ["red", "green", "blue"]
    assert loaded.arguments["head_classes"] == 3


def test_swav_learns_without_labels_and_evaluates_with_them(tmp_path):
    summary = run(tiny_arguments(tmp_path, **SWAV, head_lr=0.1, epochs=8, mask={"batch_norm": "adapt"}))
    losses = [line["loss"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert summary.after["knn"] > summary.before["knn"]
    assert summary.after.keys() == {"knn"}
    assert summary.arguments["head_classes"] is None


@pytest.mark.parametrize("options", [{}, SWAV], ids=["supervised", "swav"])
def test_evaluating_on_the_way_changes_nothing(tmp_path, options):
    mask = {"mask": {"batch_norm": "adapt"}, "eval_probe": not options}
    arguments = tiny_arguments(tmp_path, epochs=2, **options, **mask)
    run(arguments)
    run(replace(arguments, output_dir=str(tmp_path / "often"), evaluate_every=1))
    run(replace(arguments, output_dir=str(tmp_path / "never"), eval_split=None))
    one, often, never = (scores_of(tmp_path / name) for name in ("out", "often", "never"))
    assert one.keys() == often.keys() == never.keys()
    assert [
        name for name in one if not (torch.equal(one[name], often[name]) and torch.equal(one[name], never[name]))
    ] == []
    evaluations = [line for line in read_metrics(tmp_path / "often" / "metrics.jsonl") if "knn" in line]
    assert [line["epoch"] for line in evaluations] == [0, 1, 2]
    assert RunSummary.load(tmp_path / "never").after == {}


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_swav_with_small_crops_on_a_vit(tmp_path, kind):
    crops = {"multi_crop": {**SWAV["multi_crop"], "local_size": 8 if kind == "clip" else 16}}
    if kind == "clip":
        (tmp_path / "clip").mkdir()
        backbone = {"backbone": write_clip(tmp_path / "clip")}
    else:
        backbone = {"backbone": "test_vit", "pretrained": False, "image_size": 32}
    summary = run(tiny_arguments(tmp_path, **{**SWAV, **crops}, **backbone, max_steps=2))
    report = evaluate_run(tmp_path / "out", metrics=["knn"])[0]  # loaded again, for one size
    assert report.value == summary.after["knn"]


def test_before_is_the_frozen_base_also_where_the_mask_starts_elsewhere(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1, lr=500.0)
    plain = run(arguments)
    mask = {"mask_type": "topk", "density": 0.3, "init_score": "kaiming_uniform"}
    half = tiny_arguments(tmp_path, epochs=1, mask=mask, output_dir=str(tmp_path / "topk"))
    assert run(half).before == plain.before
    run(replace(half, output_dir=str(tmp_path / "never"), eval_split=None))  # switching off and on again moves nothing
    one, two = scores_of(tmp_path / "topk"), scores_of(tmp_path / "never")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    second = run(replace(arguments, init_from=arguments.output_dir, output_dir=str(tmp_path / "second")))
    assert second.before == plain.before != plain.after


def test_before_and_after_are_evaluated_alike_or_not_compared(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1)
    whole = run(arguments)
    unseen = run(replace(arguments, resume=True, eval_split=None))
    assert (unseen.before, unseen.after) == ({}, {})
    other = run(replace(arguments, resume=True, eval_split="train", eval_probe=True))
    assert (other.before, other.after.keys()) == ({}, {"knn", "linear_probe", "accuracy"})
    assert f"linear_probe: {other.after['linear_probe']:.4f}" in other.text()
    probed = replace(arguments, output_dir=str(tmp_path / "probed"))
    run(probed)
    probed = run(replace(probed, resume=True, eval_probe=True))
    assert probed.before == whole.before
    assert f" -> {whole.after['knn']:.4f}\nlinear_probe: {probed.after['linear_probe']:.4f}" in probed.text()


@pytest.mark.parametrize("adapt", ["full", "head"])
def test_the_baselines(tmp_path, adapt):
    arguments = tiny_arguments(tmp_path, adapt=adapt, lr=0.05, epochs=8, head_lr=0.2)
    summary = run(arguments)
    assert summary.density is None
    assert summary.after["accuracy"] > summary.before["accuracy"] + 0.2
    # Of a backbone that does not train, the statistics do not move either.
    assert (summary.after["knn"] == summary.before["knn"]) == (adapt == "head")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    saved, base = load_file(tmp_path / "out" / "model.safetensors"), load_base(arguments, 3).model.state_dict()
    moved = {name.partition(".")[0] for name in saved if not torch.equal(saved[name], base[name])}
    assert moved == ({"head"} if adapt == "head" else {"head", "backbone"})


@pytest.mark.parametrize("options", [{}, SWAV], ids=["supervised", "swav"])
def test_statistics_alone_move_and_nothing_of_the_backbone_trains(tmp_path, options):
    arguments = tiny_arguments(tmp_path, adapt="statistics", **options, epochs=2, head_lr=0.2)
    summary = run(arguments)
    assert summary.density is None
    saved = load_file(tmp_path / "out" / "model.safetensors")
    base = load_base(arguments, None if options else 3).model.state_dict()
    moved = {name for name in saved if not torch.equal(saved[name], base[name])}
    backbone = {name for name in moved if not name.startswith("head.")}
    assert backbone == {name for name in base if "running_" in name or "num_batches_tracked" in name}
    assert (moved > backbone) == (not options)  # a head for labels trains, that of SwAV is thrown away
    arguments, loaded = load_run(tmp_path / "out", backbone=arguments.backbone)
    assert torch.equal(loaded.model.state_dict()[next(iter(backbone))], saved[next(iter(backbone))])


def test_statistics_alone_need_some(tmp_path):
    arguments = tiny_arguments(tmp_path, adapt="statistics", backbone="vit_tiny_patch16_224", pretrained=False)
    with pytest.raises(ValueError, match=r"adapt='statistics' needs BatchNorm, and vit_tiny_patch16_224 has none"):
        run(arguments)


def test_a_progressive_mask_ends_at_its_density_also_when_it_is_resumed_there(tmp_path):
    mask = {"mask_type": "topk", "density": 0.6, "density_schedule": "linear", "init_score": "kaiming_uniform"}
    arguments = tiny_arguments(tmp_path, mask=mask, epochs=1, log_every=1)
    first = run(arguments)
    densities = [line["density"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    assert densities == pytest.approx([1.0, 0.6 + 0.4 * 2 / 3, 0.6 + 0.4 / 3, 0.6], abs=1e-3)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert run(replace(arguments, resume=True)).density == first.density == pytest.approx(0.6, abs=1e-3)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_finished_run_resumed_is_finished(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1)
    first = run(arguments)
    again = run(replace(arguments, resume=True))
    assert (again.steps, again.after, again.loss) == (first.steps, first.after, first.loss)


def test_a_finished_run_is_not_overwritten(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1, eval_split=None, keep_checkpoints=0)
    run(arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for resume, words in ((False, "finished run: choose"), (True, "finished run, and no checkpoint: choose")):
        with pytest.raises(ValueError, match=rf"out holds run\.json of a {words} another output_dir, or delete it"):
            run(replace(arguments, seed=1, resume=resume))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_adapter_that_no_run_wrote_is_not_overwritten(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1, eval_split=None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"out holds an adapter \(adapter_config\.json\) that no run wrote: choose another"
    ):
        run(arguments)
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "{}"
    (tmp_path / "out" / "metrics.jsonl").touch()  # of a run that was killed
    run(arguments)


def test_a_plan_builds_everything_and_writes_nothing(tmp_path):
    arguments = tiny_arguments(tmp_path, eval_limit=10)
    text = plan(arguments)
    for part in ("16 px, 16 features", f"{TRAIN} images of", f"10 of {tmp_path / 'set.npz'} (test)", "8 steps of 12"):
        assert part in text
    assert "24,768 scores, 51 others" in text
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_in_the_middle_stops_the_run_with_its_row(tmp_path):
    arguments = tiny_arguments(tmp_path, dataset=str(write_npz(tmp_path / "cut.npz", broken=17)), eval_split=None)
    with pytest.raises(ImageError, match=r"cut\.npz, row 17: cannot be read as an image"):
        run(arguments)


def test_bad_data_is_found_before_training(tmp_path):
    one_class = str(write_npz(tmp_path / "one.npz", labels=[1] * TRAIN + [0, 1] * (TEST // 2)))
    for options, message in (
        ({"dataset": one_class}, r"All 48 images of .*one\.npz, split 'train', are of one class \(green\)"),
        ({"batch_size": 100}, r"48 images are fewer than one batch of 100"),
        ({"batch_size": 12, "accumulate": 5}, r"batch_size=12 does not divide into 1 processes × 5 accumulated parts"),
        (
            {"head": "probe", "limit": 2},
            r"head='probe' needs all: the training images have 2 of 3 classes\. Take more",
        ),
        ({"train_split": "val"}, r"has no split 'val': an npz has 'train' and 'test'"),
        ({"objective": "cross_entropi"}, r"Unknown objective 'cross_entropi'\. Did you mean cross_entropy\?"),
        ({"dataset": "cifar1000"}, r"Unknown dataset 'cifar1000'\. Did you mean cifar100"),
        ({"objective_options": {"label_smooth": 0.1}}, r"label_smooth.*Did you mean label_smoothing"),
        ({**SWAV, "objective_options": {"prototypes": 40, "queue_length": 0}}, r"40 prototypes cannot each get"),
        ({**SWAV, "multi_crop": {"local_size": 16}}, r"multi_crop\.local_size=16 must be below the image size, 16"),
        (
            {**SWAV, "multi_crop": {"global_size": 32}},
            r"multi_crop\.global_size=32 is not the image size, 16.*set image",
        ),
        (
            {**SWAV, "backbone": "mixer_s32_224", "pretrained": False, "multi_crop": {}},
            r"mixer_s32_224 takes images of 224 pixels, and none of 96.* Set .*multi_crop\.local_crops=0",
        ),
        ({"output_dir": str(tmp_path / "set.npz" / "out")}, r"Cannot write into output_dir=.*set\.npz/out: Not a dir"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(tiny_arguments(tmp_path, **options))
        assert read_metrics(tmp_path / "out" / "metrics.jsonl") == []  # nor was anything evaluated
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_table_without_labels_names_its_columns(tmp_path):
    import datasets

    rows = {"photo": [{"bytes": picture(0, np.random.default_rng(0)), "path": None}], "width": [20]}
    path = tmp_path / "set.parquet"
    features = datasets.Features({"photo": datasets.Image(), "width": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"set\.parquet has no label column; it has photo, width: pass label_column="):
        run(tiny_arguments(tmp_path, dataset=str(path)))


@pytest.mark.parametrize("folders", [[], ["all"]], ids=["flat", "one class"])
def test_without_labels_swav_trains_and_evaluates_nothing(tmp_path, folders):
    folder = tmp_path.joinpath("images", *folders)
    folder.mkdir(parents=True)
    for index in range(12):
        (folder / f"{index}.png").write_bytes(picture(index % 3, np.random.default_rng(index)))
    arguments = tiny_arguments(tmp_path, **SWAV, dataset=str(tmp_path / "images"), max_steps=1)
    with pytest.warns(UserWarning, match=r"images.*: nothing is evaluated, as with --eval-split none\.$"):
        assert "evaluation  none" in plan(arguments)
    with pytest.warns(UserWarning, match="nothing is evaluated"):
        summary = run(arguments)
    assert (summary.steps, summary.arguments["eval_split"], summary.after) == (1, None, {})
    with pytest.raises(ValueError, match=r"In training: an objective such as swav, and --eval-split none\."):
        plan(replace(arguments, objective="cross_entropy", objective_options={}))


def test_classes_of_one_image_leave_none_to_evaluate_on(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(picture(0, np.random.default_rng(0)))
    with pytest.warns(UserWarning, match="held out"), pytest.raises(ValueError, match=r"No class has two.*split none"):
        run(tiny_arguments(tmp_path, dataset=str(tmp_path / "images")))


def test_other_settings_are_refused_on_resuming(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1)
    run(arguments)
    other = replace(arguments, resume=True, lr=6.0, mask=replace(arguments.mask, batch_norm="adapt"))
    with pytest.raises(ValueError, match=r"other settings(?s:.*)\n  lr: was 5\.0, is 6\.0\n  mask: (?s:.*)start anew"):
        run(other)


def test_a_damaged_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}}))
    with pytest.raises(ValueError, match=r"run\.json is not what a run writes .*missing"):
        RunSummary.load(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """Function that gives a file system so many kilobytes; it is unmounted afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes, *options):
        options = ",".join([f"size={kilobytes}k", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting needs rights that this user does not have")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount here")
def test_a_disk_that_fills_up_costs_no_step_that_was_saved(tmp_path, small_disk):
    arguments = tiny_arguments(tmp_path, output_dir=str(small_disk(320) / "out"), checkpoint_every=1)
    with pytest.raises(OSError, match=r"checkpoint-2: .*No space left.*checkpoint-1 is whole: free some space"):
        run(arguments)
    assert [path.name for path in list_checkpoints(arguments.output_dir)] == ["checkpoint-1"]
    small_disk(4000, "remount")
    run(replace(arguments, resume=True))
    run(replace(arguments, output_dir=str(tmp_path / "whole")))
    one, two = scores_of(arguments.output_dir), scores_of(tmp_path / "whole")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
