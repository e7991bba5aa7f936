# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C asks once, what comes at the same moment is the same request, and a later one ends at once."""

from __future__ import annotations

import signal
import threading

import pytest

from smn_peft.training import metrics
from smn_peft.training.metrics import StopRequest


def test_the_first_only_asks_and_a_launchers_copies_add_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_one_ends_at_once(monkeypatch):
    monkeypatch.setattr(metrics, "_SAME_REQUEST", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_takes_nothing_over():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
