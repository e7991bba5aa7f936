# SPDX-License-Identifier: Apache-2.0
"""`smn embed`: whatever can be named, in parts, jobs and processes, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

from smn_peft.bank.store import DiskStore
from smn_peft.cli import app
from smn_peft.data import load_images
from smn_peft.embedding import Embedder
from tests.training.tiny import base_of, finished_run, smn

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the base, the dataset and a run."""
    return finished_run(tmp_path_factory.mktemp("embed"), max_steps=2, mask={"batch_norm": "adapt"})


def embed(*words: object, code: int = 0):
    result = runner.invoke(app, ["embed", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_a_base_a_run_and_a_task_by_name(folder, tmp_path):
    base, data = base_of(folder), ["--dataset", folder / "set.npz", "--split", "test", "--cpu", "--batch-size", 10]
    with DiskStore(tmp_path / "bank") as store:
        store.add_many([("birds", folder / "out")])
    images = load_images(folder / "set.npz", "test")
    batch = {"image": [images[index]["image"] for index in range(len(images))]}
    for number, (words, adapter) in enumerate(
        [
            ([base], None),
            ([folder / "out", "--backbone", base], folder / "out"),
            ([f"{tmp_path / 'bank'}:birds", "--backbone", base], folder / "out"),
        ]
    ):
        said = embed(*words, *data, "-o", tmp_path / str(number)).stdout
        assert said.startswith(f"{tmp_path / str(number)}: 24 images in 1 parts, dim 16; 1 written, ")
        found = parquet.read_table(tmp_path / str(number) / "part-00000-of-00001.parquet")
        expected = Embedder(base, adapter, batch_size=10)(batch)["embedding"]
        assert np.array_equal(np.stack(found["embedding"].to_numpy()), expected)
    assert "a program, which is run only if you name it" in embed(folder / "out", *data, "-o", "x", code=1).stderr
    assert "name one of its tasks" in embed(tmp_path / "bank", *data, "-o", "x", code=1).stderr


def test_jobs_share_the_parts_and_the_same_line_does_nothing_twice(folder, tmp_path):
    line = [base_of(folder), "--dataset", folder / "set.npz", "--cpu", "--part-size", 10, "-o", tmp_path / "parts"]
    said = embed(*line, "--part", "2/2").stdout
    assert "48 images in 5 parts" in said
    assert [path.name[:10] for path in sorted((tmp_path / "parts").iterdir())] == [f"part-0000{i}" for i in (2, 3, 4)]
    assert "; 2 written" in embed(*line, "--part", "1/2").stdout
    assert embed(*line).stdout.endswith("0 written, 5 were there\n")
    assert "--part is I/N with I from 1 to N" in embed(*line, "--part", "0/2", code=1).stderr
    assert "(part_size: 10, now 11)" in embed(*line, "--part-size", 11, code=1).stderr


def test_labels_are_written_where_there_are_some(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b", "a"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    with pytest.warns(UserWarning, match="has no folders of classes, so no labels: no labels are written"):
        embed(base_of(folder), "--dataset", tmp_path / "images", "--cpu", "-o", tmp_path / "parts")
    found = parquet.read_table(tmp_path / "parts" / "part-00000-of-00001.parquet")
    assert found.column_names == ["index", "key", "embedding"]
    assert found["key"].to_pylist() == ["a.png", "b.png"]


def test_mistakes(folder, tmp_path):
    line = [base_of(folder), "-o", tmp_path / "parts"]
    assert "--dataset" in embed(*line, code=2).stderr
    line += ["--dataset", folder / "set.npz", "--cpu"]
    assert "mode='whitened' is of a cascade" in embed(*line, "--mode", "whitened", code=1).stderr
    assert "'both' is not one of 'dispatcher'" in embed(*line, "--mode", "both", code=2).stderr
    assert "need --launch" in " ".join(embed(*line, "--num_processes", 2, code=2).stderr.split())
    said = embed("--launch", "--num_processes", 2, *line, code=2).stderr
    assert "MODEL comes before the options of `accelerate launch`" in said
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(folder, tmp_path):
    line = [base_of(folder), "--dataset", folder / "set.npz", "--cpu", "--part-size", 10, "--batch-size", 4]
    done = smn("embed", *line, "-o", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    launched = ["--launch", "--num_processes", 2, "--main_process_port", 0]
    done = smn("embed", *line, "-o", tmp_path / "two", *launched)
    assert done.returncode == 0, done.stderr
    assert "3 written by process 1 of 2" in done.stdout
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) == 5
