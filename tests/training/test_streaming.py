# SPDX-License-Identifier: Apache-2.0
"""Training from streams: no copy, every image once a pass, and a resumed run is the uninterrupted one, to the bit."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from smn_peft.cascade import Cascade, CascadeArguments
from smn_peft.data import build_stream_loader, stream_images
from smn_peft.training import Trainer, run
from smn_peft.training.saved import evaluate_run
from tests.gloo import join_group, run_processes

from .tiny import CLASSES, SWAV, base_of, picture, tiny_arguments

datasets = pytest.importorskip("datasets")
SHARDS, EACH = 5, 7


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """`datasets` sleeps 5 s after each part of a pass over parquet, for what Arrow's threads do when Python ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def write_parquet(folder: Path) -> Path:
    """Training images in `SHARDS` files, test images in one, with names of the classes."""
    generator = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for shard, split in [*enumerate(["train"] * SHARDS), (0, "test")]:
        rows = [
            {"image": {"bytes": picture(i % 3, generator), "path": f"{shard}-{i}.png"}, "label": i % 3}
            for i in range(EACH)
        ]
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-{shard}.parquet")
    return folder


def write_tars(folder: Path) -> Path:
    """The same numbers of images as tars of webdataset: ``key.png`` and ``key.cls``."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for i in range(EACH):
                for suffix, content in (("png", picture(i % 3, generator)), ("cls", str(i % 3).encode())):
                    entry = tarfile.TarInfo(f"{shard}-{i}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder


def streamed(folder: Path, **options):
    """Arguments of 8 steps in epochs of 4, whose 96 images are more than two passes over 35."""
    given = {"streaming": True, "steps_per_epoch": 4, "shuffle_buffer": 6, "eval_split": None}
    return tiny_arguments(folder, **{**given, "checkpoint_every": 1, "keep_checkpoints": 99, **options})


def state_of(folder: Path, step: int) -> bytes:
    return (folder / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def interrupted(arguments, at: int):
    """Arguments to go on in another folder from step `at` of a run."""
    folder = Path(f"{arguments.output_dir}-from-{at}")
    shutil.copytree(Path(arguments.output_dir) / f"checkpoint-{at}", folder / f"checkpoint-{at}")
    return replace(arguments, output_dir=str(folder), resume=True)


def names(stream, batches: int, *, epochs: int = 1, start: int = 0, state=None, **options) -> list[list[str]]:
    """Files of the images in each batch of 5, from batch `start` of the first epoch on."""
    seen: list[str] = []
    read = type(stream).read

    def reading(self, row, number):
        seen.append(row[self.image_column]["path"])
        return read(self, row, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stream), "read", reading)
        loader = build_stream_loader(stream, lambda image, _: torch.zeros(1), 5, batches, buffer_size=6, **options)
        if state is not None:
            loader.load_state_dict(state)
        first, found = (state or {"epoch": 0})["epoch"], []
        for epoch in range(first, first + epochs):
            loader.set_epoch(epoch, start if epoch == first else 0)
            for _ in loader:
                found.append(seen[:])
                seen.clear()
        return found


def test_a_pass_has_every_image_once_and_the_next_another_order(tmp_path):
    stream = stream_images(str(write_parquet(tmp_path / "set")))
    assert stream.classes == list(CLASSES)
    assert stream.num_classes == 3
    assert stream.num_shards == SHARDS
    batches = names(stream, 7, epochs=2)
    passes = [[*chain(*part)] for part in (batches[:7], batches[7:])]
    assert [len(set(part)) for part in passes] == [SHARDS * EACH] * 2
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])
    assert names(stream, 14) == batches  # an epoch is a number, not another order
    assert names(stream, 7, seed=1) != batches[:7]
    shares = [[*chain(*names(stream, 30, num_processes=5, process_index=index)[:7])] for index in range(5)]
    assert [len(share) for share in shares] == [7] * 5  # of batches of 5, which 5 processes share
    assert Counter([*chain(*shares)]) == Counter(passes[0])


def test_a_position_continues_the_order(tmp_path):
    stream = stream_images(str(write_tars(tmp_path / "set")))
    whole = names(stream, 4, epochs=3)
    loader = build_stream_loader(stream, lambda image, _: torch.zeros(1), 5, 4, buffer_size=6)
    for _ in loader:
        pass
    state = loader.state_dict()
    assert state == {"epoch": 1, "positions": [[0, 20]], "num_workers": 0}
    assert names(stream, 4, epochs=2, state=state, start=2) == whole[6:]
    loader.set_epoch(1)
    next(iter(loader))
    assert loader.state_dict() == state
    loader.set_epoch(1)  # the same again
    with pytest.raises(ValueError, match="in epoch 1; it cannot begin 3"):
        loader.set_epoch(3)


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_parquet, {}),
        pytest.param(write_parquet, {"num_workers": 2, **SWAV}, marks=pytest.mark.slow),
        (write_tars, {"num_workers": 2, "num_classes": 3, "accumulate": 2}),
        pytest.param(write_tars, {**SWAV, "objective": "infonce", "objective_options": {}}, marks=pytest.mark.slow),
    ],
    ids=["labels", "swav in workers", "tars in workers", "tars without labels"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, write, options):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = streamed(tmp_path, dataset=str(write(tmp_path / "set")), **options)
    run(arguments)
    for at in (3, 4, 6):
        resumed = interrupted(arguments, at)
        run(resumed)
        assert state_of(Path(resumed.output_dir), 8) == state_of(Path(arguments.output_dir), 8)
    assert state_of(Path(arguments.output_dir), 8) != state_of(Path(arguments.output_dir), 4)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".arrow"]


def work(arguments) -> dict[str, torch.Tensor]:
    join_group()
    return {"steps": torch.tensor(run(arguments).steps)}


@pytest.mark.slow
def test_two_processes_resume_too(tmp_path):
    arguments = streamed(tmp_path, dataset=str(write_parquet(tmp_path / "set")))
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        resumed = arguments if name == "whole" else interrupted(arguments, 6)
        assert [int(found["steps"]) for found in run_processes(work, 2, tmp_path / name, resumed)] == [8, 8]
    assert state_of(Path(resumed.output_dir), 8) == state_of(Path(arguments.output_dir), 8)
    with pytest.raises(ValueError, match="2 processes read the stream, and now 1, so its order would change"):
        run(interrupted(arguments, 5))


def test_evaluation_holds_a_bounded_part(tmp_path):
    limits = {"eval_split": "test", "eval_limit": 6, "knn_limit": 11}
    arguments = streamed(tmp_path, dataset=str(write_parquet(tmp_path / "set")), max_steps=1, **limits)
    summary = run(arguments)
    assert {*summary.after} == {"knn", "accuracy"}
    assert summary.arguments["images"] is None
    assert [report.values[0] for report in evaluate_run(arguments.output_dir, backbone=base_of(tmp_path))] == [
        *summary.after.values()
    ]


def test_what_cannot_be_streamed_is_refused_before_training(tmp_path):
    folder = write_parquet(tmp_path / "set")
    tars = write_tars(tmp_path / "tars")
    (tmp_path / "empty").mkdir()
    good = streamed(tmp_path, dataset=str(folder))
    needs_all = "needs all images at once; leave it out, or streaming"
    for message, options in {
        "A stream has no length: pass steps_per_epoch=N": {"steps_per_epoch": None},
        "pass eval_limit and knn_limit": {"eval_split": "test"},
        f"cache_images, limit: {needs_all}": {"limit": 4, "cache_images": True},
        f"head='probe': {needs_all}": {"head": "probe"},
        "steps_per_epoch: of a stream": {"streaming": False, "shuffle_buffer": 1000},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(good, **options)
    for message, options in {
        "split 'nope'.*Name another to evaluate on": {"eval_split": "nope", "eval_limit": 3, "knn_limit": 3},
        "does not say how many classes its column 'cls' has: pass num_classes": {"dataset": str(tars)},
        "the label is 2, and must lie in \\[0, 2\\)": {"dataset": str(tars), "num_classes": 2},
        "names 3 classes, and num_classes=4": {"num_classes": 4},
        "has no columns of images; pass image_column=": {"dataset": f"{tmp_path}/none.parquet"},
        "is read by index from this disk": {"dataset": str(tmp_path / "empty")},
        "a stream's labels are numbers: store it as a ClassLabel": {"dataset": f"{tmp_path}/words.parquet"},
    }.items():
        datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "none.parquet")
        words = {"image": [{"bytes": b"", "path": None}], "label": ["red"]}
        datasets.Dataset.from_dict(words).to_parquet(tmp_path / "words.parquet")
        with pytest.raises(ValueError, match=message):
            run(replace(good, **options))
    with pytest.raises(ValueError, match="is a tar, which is read in order only: stream it"):
        run(
            replace(
                good, dataset=str(tars / "train-0.tar"), streaming=False, steps_per_epoch=None, shuffle_buffer=1000
            )
        )
    with pytest.raises(ValueError, match="A cascade clusters all training images: leave out streaming"):
        Cascade.fit(replace(good, **SWAV), CascadeArguments())


def test_few_shards_and_other_workers(tmp_path):
    stream = stream_images(f"{write_parquet(tmp_path / 'set')}/train-[01].parquet")
    transform = lambda image, _: torch.zeros(1)  # noqa: E731
    with pytest.raises(ValueError, match="has 2 shards for 3 processes, and each needs one of its own"):
        build_stream_loader(stream, transform, 6, 1, num_processes=3)
    with pytest.warns(UserWarning, match="keep 1 workers a process busy, not 4: only those are started"):
        loader = build_stream_loader(stream, transform, 6, 1, num_processes=2, num_workers=4)
    with pytest.raises(ValueError, match="read with num_workers=0, and with 1 its order would change"):
        loader.load_state_dict({"epoch": 0, "positions": [[0, 0]], "num_workers": 0})


def test_a_loader_without_a_length_needs_the_steps_of_an_epoch(tmp_path):
    from smn_peft.training import LoopArguments
    from smn_peft.training.assemble import build_images, build_task, build_train_loader

    arguments = streamed(tmp_path, dataset=str(write_parquet(tmp_path / "set")))
    images = build_images(arguments)
    task, backbone = build_task(arguments, images)
    loop = LoopArguments(output_dir=str(tmp_path / "loop"), cpu=True, batch_size=12)
    with pytest.raises(ValueError, match="The loader has no length: set steps_per_epoch"):
        Trainer(task, build_train_loader(arguments, images, backbone, 1, 0), loop)
