# SPDX-License-Identifier: Apache-2.0
"""What is no regular file, or too large, is refused at once wherever an adapter, a run or images are read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from peft import PeftModel

from smn_peft.backbones import load_backbone
from smn_peft.bank.source import read_adapter
from smn_peft.cascade.folder import read_json as cascade_json
from smn_peft.cli import app
from smn_peft.data import load_images
from smn_peft.hub import push_run
from smn_peft.hub.facts import facts_of_folder
from smn_peft.storage.adapter_config import read_config
from smn_peft.storage.adapter_file import check_adapter_file
from smn_peft.storage.files import MAX_JSON, check_regular, open_regular, read_bytes, read_json
from smn_peft.storage.inspection import inspect_adapter, verify_adapter_file
from smn_peft.storage.repack import pack_adapter
from smn_peft.training import RunSummary, load_run
from smn_peft.training.assemble import read_indices
from tests.hub.folders import base, write_run

WEIGHTS, CONFIG, RUN = "adapter_model.safetensors", "adapter_config.json", "run.json"
KINDS = {"fifo": "a FIFO", "zero": "a device", "socket": "a socket", "folder": "a folder"}


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A reader that waits for a writer, or for the end of /dev/zero, is interrupted."""

    def late(*_: object) -> None:
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, kind: str) -> Path:
    """Something that is no file, in the place of what was there."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        os.symlink("/dev/zero", path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is 100 characters long at most
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_readers(tmp_path, kind):
    thing = put(tmp_path / "thing", kind)
    for read in (open_regular, check_regular, read_bytes, read_json):
        with pytest.raises(ValueError, match=rf"thing is {KINDS[kind]} and no regular file"):
            read(thing)


@pytest.mark.parametrize("kind", KINDS)
def test_weights(tmp_path, kind):
    write_run(tmp_path)
    put(tmp_path / WEIGHTS, kind)
    readers: list[Callable[[Path], object]] = [
        check_adapter_file,
        verify_adapter_file,
        inspect_adapter,
        read_adapter,
        facts_of_folder,
        lambda folder: pack_adapter(folder, folder / "out"),
        lambda folder: push_run(folder, "user/x"),
        lambda folder: PeftModel.from_pretrained(base(), str(folder)),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=rf"{WEIGHTS} is ({KINDS[kind]}|a link to /dev/zero)"):
            read(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_configs(tmp_path, kind):
    write_run(tmp_path)
    (tmp_path / RUN).unlink()
    put(tmp_path / CONFIG, kind)
    for read in (read_config, read_adapter, facts_of_folder, load_run):
        with pytest.raises(ValueError, match=rf"{CONFIG} is {KINDS[kind]}"):
            read(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_other_records_of_a_run(tmp_path, kind):
    write_run(tmp_path)
    put(tmp_path / RUN, kind)
    for read in (RunSummary.load, facts_of_folder):
        with pytest.raises(ValueError, match=f"{RUN} is {KINDS[kind]}"):
            read(tmp_path)
    with pytest.raises(ValueError, match=f"cascade.json is {KINDS[kind]}"):
        cascade_json(put(tmp_path / "cascade.json", kind), {})
    with pytest.raises(ValueError, match=f"chosen.npy is {KINDS[kind]}"):
        read_indices(put(tmp_path / "chosen.npy", kind), 3)
    with pytest.raises(ValueError, match=f"own.safetensors is {KINDS[kind]}"):
        load_backbone("resnet18", state_dict=put(tmp_path / "own.safetensors", kind))


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_images(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"set\.npz is {KINDS[kind]}"):
        load_images(put(tmp_path / "set.npz", kind))
    for label in ("a", "b"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        put(tmp_path / "folder" / label / "cat.jpg", kind)
    dataset = load_images(tmp_path / "folder")
    with pytest.raises(ValueError, match=rf"cat\.jpg is {KINDS[kind]}"):
        dataset[0]


def test_a_config_of_17_megabytes(tmp_path):
    write_run(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "inference_mode": "x" * 17_000_000}))
    for read in (read_config, read_adapter, facts_of_folder):
        with pytest.raises(ValueError, match=rf"has 17,\d+,\d+ bytes; such a file has {MAX_JSON:,} at most"):
            read(tmp_path)
    result = CliRunner().invoke(app, ["pack", str(tmp_path), "-o", str(tmp_path / "out")])
    assert "at most" in result.output
    assert "space" not in result.output


def test_what_is_nested_without_end(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 500_000)
    with pytest.raises(ValueError, match=r"deep\.json is damaged: it is nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_regular_files_are_read_through_links(tmp_path):
    write_run(tmp_path / "a")
    shutil.move(tmp_path / "a" / WEIGHTS, tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "a" / WEIGHTS)
    assert read_adapter(tmp_path / "a").tensors
    np.save(tmp_path / "chosen.npy", np.arange(3))
    assert read_indices(tmp_path / "chosen.npy", 3).tolist() == [0, 1, 2]
    (tmp_path / "x.json").write_text("[1]")
    assert read_json(tmp_path / "x.json") == [1]
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")
