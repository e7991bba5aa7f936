# SPDX-License-Identifier: Apache-2.0
"""Workers leave signals to the main process: what reaches the whole group ends no step, and nobody stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from smn_peft.data.loading import PatientLoader, build_loader
from smn_peft.evaluation import extract_features
from tests.processes import context, leave_the_test


class Slow(torch.utils.data.Dataset):
    """16 images; each takes a moment."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        time.sleep(0.05)
        return {"image": torch.full((3, 4, 4), index, dtype=torch.uint8), "label": index}


def as_float(image):
    return image.float()


def extract(folder):
    """As an evaluation in the middle of training, with `StopRequest`'s handlers."""
    leave_the_test()
    os.setsid()
    got = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: got.append(number))

    def count(pixels):
        (folder / "started").touch()
        return pixels.mean((1, 2, 3))[:, None]

    found = extract_features(nn.Flatten(), Slow(), as_float, batch_size=2, num_workers=2, function=count)
    (folder / "found").write_text(f"{found.labels.tolist()} {sorted(set(got))}")


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_processes_interrupts_no_batch(tmp_path, number):
    process = context().Process(target=extract, args=(tmp_path,))
    process.start()
    wait_for(tmp_path / "started")
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "found").read_text() == f"{list(range(16))} [{int(number)}]"


def leave_early(folder, persistent):
    leave_the_test()
    loader = PatientLoader(Slow(), 2, num_workers=2, persistent_workers=persistent)
    kept.append(iter(loader))  # still alive when the process ends
    next(kept[0])
    pids = [worker.pid for worker in multiprocessing.active_children()]
    (folder / "pids").write_text(" ".join(map(str, pids)))


kept = []


@pytest.mark.parametrize("persistent", [False, True])
def test_who_leaves_in_the_middle_of_an_epoch_does_not_wait_for_workers(tmp_path, persistent):
    process = context().Process(target=leave_early, args=(tmp_path, persistent))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_can_only_be_read_in_order_is_refused():
    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match=r"A Streamed can only be read in order.*without streaming=True"):
        build_loader(Streamed(), as_float, 2)
    with pytest.raises(ValueError, match="A generator can only be read in order"):
        extract_features(nn.Flatten(), (i for i in range(3)), as_float)
