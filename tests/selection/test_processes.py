# SPDX-License-Identifier: Apache-2.0
"""Selections in processes that others made: forked, spawned, workers of a DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import threading

import _choices
import pytest
import torch
from _choices import Choices, choose
from torch.utils.data import DataLoader


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(_choices.__file__))
    expected = [choose(seed) for seed in range(6)]  # this process has threads in its pool
    loader = DataLoader(Choices(), num_workers=2, multiprocessing_context=method)
    assert [batch.squeeze(0).tolist() for batch in loader] == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_selects() -> None:
    """The child has a pool of threads of its own: the parent's is locked for ever."""
    torch.set_num_threads(2)
    expected = choose(0)
    stop = threading.Event()

    def select() -> None:
        while not stop.is_set():
            choose(1)

    thread = threading.Thread(target=select)
    thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(5):
            receive, send = context.Pipe(duplex=False)
            child = context.Process(target=lambda to=send: to.send(choose(0)))
            child.start()
            assert receive.poll(60), "a call hangs in the child"
            assert receive.recv() == expected
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()
