# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: signal handlers and other threads that raise at any moment."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from _models import Before, gpt2, plain, texts
from _signals import SIGNALS, AtEvery, raising
from hullkit.finetune import TestTimeFinetuner, adaptation, eager_passes, query_run, snapshot
from hullkit.finetune import tuner as tuner_module
from hullkit.language_model import fused_modules, pass_modes, product_settings, torch_settings
from hullkit.language_model import loss as loss_module
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = (adaptation, snapshot, loss_module, eager_passes, query_run, tuner_module)
EDGES = ("_claim", "_enter", "_leave")


def raises(model: nn.Module, error: type[BaseException], updates: int) -> bool:
    """Whether a query of the model ends in this error."""
    try:
        with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [updates]):
            pass
    except error:
        return True
    return False


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "opcodes"])
@pytest.mark.parametrize("signum", SIGNALS, ids=[s.name for s in SIGNALS])
def test_signal_at_any_moment(signum: int, opcodes: bool) -> None:
    model = plain()
    at_every = AtEvery(
        lambda: signal.raise_signal(signum),
        MODULES,
        functions=EDGES if opcodes else (),
        opcodes=opcodes,
    )
    interrupted = False

    def query() -> None:
        nonlocal interrupted
        interrupted = raises(model, SIGNALS[signum], updates=2)

    def check(sent: bool) -> None:
        before.check()
        assert interrupted == sent

    with raising(signum, SIGNALS[signum]):
        before = Before(model)
        at_every.run(query, check)
    assert at_every.where >= set(EDGES)
    if not opcodes:
        assert at_every.where >= {"run", "_of", "_pass", "reuse", "restore", "__init__"}


@pytest.mark.parametrize("signum", SIGNALS, ids=[s.name for s in SIGNALS])
def test_signal_whose_handler_the_block_has_set(signum: int) -> None:
    """Nobody knew of it on entry."""
    model = plain()
    before = Before(model)
    at_every = AtEvery(
        lambda: signal.raise_signal(signum), MODULES, functions=("_leave", "restore")
    )
    set_inside: Any = None
    interrupted = False
    outside = signal.getsignal(signum)

    def handler(*_: object) -> None:
        raise SIGNALS[signum]("from the handler")

    def query() -> None:
        nonlocal set_inside, interrupted
        interrupted = False
        try:
            with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [2]):
                signal.signal(signum, handler)
        except SIGNALS[signum]:
            interrupted = True
        set_inside = signal.signal(signum, outside)

    def check(sent: bool) -> None:
        before.check()
        assert set_inside is handler  # it is the block's to leave behind
        assert interrupted == sent

    at_every.run(query, check)
    assert at_every.where == {"_leave", "restore"}


@pytest.mark.usefixtures("replaced_on_a_cpu")
def test_signal_as_what_models_compute_is_put_back() -> None:
    model = gpt2()
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), modules=(fused_modules,))

    def query() -> None:
        try:
            with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [1]):
                pass
        except TimeoutError:
            pass

    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(query, lambda _: before.check())
    assert "stand_ins" in at_every.where


def test_signal_as_products_get_their_precision() -> None:
    """Settings are as before, and no block is left for which others would wait."""
    model = plain()
    # Not the line that takes a lock: Python hears no signal between the lock and its block.
    at_every = AtEvery(
        lambda: signal.raise_signal(signal.SIGALRM),
        modules=(product_settings,),
        functions=("_follow", "_set", "put_back", "may_begin"),
    )
    torch.set_float32_matmul_precision("high")

    def check(sent: bool) -> None:
        before.check()
        kept = (product_settings._blocks, product_settings._running, product_settings._waiting)
        assert not any(kept)

    try:
        with raising(signal.SIGALRM, TimeoutError):
            before = Before(model)
            at_every.run(lambda: raises(model, TimeoutError, updates=1) and None, check)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert at_every.where >= {"_follow", "_set", "put_back", "may_begin"}


@pytest.mark.usefixtures("replaced_on_a_cpu")
def test_signal_as_torch_takes_a_mode_off_its_stack() -> None:
    """torch does so for each function that a mode handles; the error may keep it off, or on."""
    model = plain()
    at_every = AtEvery(
        lambda: signal.raise_signal(signal.SIGALRM),
        modules=(torch.overrides, pass_modes, contextlib),
        functions=("_pop_mode_temporarily", "_pop_mode", "_push_mode", "__enter__", "__exit__"),
        opcodes=True,
    )
    interrupted = False

    def query() -> None:
        nonlocal interrupted
        interrupted = raises(model, TimeoutError, updates=1)

    def check(sent: bool) -> None:
        before.check()
        assert interrupted == sent
        left = torch.overrides._get_current_function_mode_stack()
        assert len(left) <= 1  # the next pass takes it off
        assert not any(mode._running for mode in left)

    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(query, check)
    assert at_every.where >= {"_pop_mode_temporarily", "_push_mode", "__enter__", "__exit__"}


@pytest.mark.parametrize("error", [TimeoutError, SystemExit, MemoryError])
def test_error_at_any_moment_of_the_way_out(error: type[BaseException]) -> None:
    """Raised as another thread does it (`PyThreadState_SetAsyncExc`), which nothing holds back."""
    model = plain()
    before = Before(model)

    def act() -> None:
        raise error("at any moment")

    at_every = AtEvery(act, modules=(adaptation, snapshot))
    raised = False

    def query() -> None:
        nonlocal raised
        raised = raises(model, error, updates=2)

    def check(sent: bool) -> None:
        before.check()
        assert torch.is_grad_enabled()
        # Where one tensor is restored, an error may be its own: it is tried again.
        assert raised or not sent or at_every.where & {"_restore", "_write", "_twice"}

    at_every.run(query, check)
    assert at_every.where >= {"_leave", "restore", "_restore", "_write"}


def test_errors_from_another_thread_all_the_time() -> None:
    """In a thread that is not the main one, which signals do not reach."""
    model = plain()
    before = Before(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [2]):
        pass  # imports what is imported at first use
    interrupted = 0
    enough = threading.Event()

    def work() -> None:
        nonlocal interrupted
        while not enough.is_set():
            try:
                before.check()
                with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [2]):
                    pass
            except TimeoutError:
                interrupted += 1

    def until_the_end() -> None:
        nonlocal interrupted
        while not enough.is_set():
            try:
                work()
            except TimeoutError:  # it may come outside of the inner try, too
                interrupted += 1

    thread = threading.Thread(target=until_the_end)
    thread.start()
    raise_in, ident = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(thread.ident or 0)
    ends = time.monotonic() + 120.0
    for turn in itertools.count():
        time.sleep(1e-3 * (2 + turn % 7))
        before_this = interrupted
        raise_in(ident, ctypes.py_object(TimeoutError))
        if interrupted > 50 or time.monotonic() > ends:
            break
    ends = time.monotonic() + 5.0
    while interrupted == before_this and time.monotonic() < ends:
        time.sleep(0.01)  # one that never came would slow the interpreter down from here on
    enough.set()
    thread.join()
    assert interrupted > 50
    before.check()


def test_several_signals_at_once() -> None:
    """All of their handlers run, once the model is restored; the latest error tells of the rest."""
    model = plain()
    before = Before(model)
    calls: list[int] = []

    def handler(signum: int, frame: object) -> None:
        assert frame is not None
        before.check_bits()
        calls.append(signum)
        raise SIGNALS[signal.Signals(signum)]

    def restore(own: snapshot.Snapshot) -> Exception | None:
        for signum in SIGNALS:
            signal.raise_signal(signum)
        assert not calls
        return original(own)

    original = snapshot.Snapshot.restore
    previous = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as raised:  # noqa: SIM117
            with TestTimeFinetuner(model, lr=1e-2).adapted(texts(1), [2]):
                patch.setattr(snapshot.Snapshot, "restore", restore)
        assert [signal.getsignal(signum) for signum in SIGNALS] == [handler] * 3
    finally:
        for signum, other in previous.items():
            signal.signal(signum, other)
    assert calls == list(SIGNALS)
    assert isinstance(raised.value.__context__, TimeoutError)
    assert isinstance(raised.value.__context__.__context__, KeyboardInterrupt)
    before.check()


def test_torch_settings_that_a_cut_pass_leaves_behind() -> None:
    """`__exit__` of torch's own context managers may be cut short, too."""

    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(31, 31)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            torch.autocast("cpu", torch.bfloat16).__enter__()
            torch.set_float32_matmul_precision("medium")
            torch.no_grad().__enter__()
            raise TimeoutError

    model = Leaving()
    before = Before(model)
    depth = torch_settings.autocast_depth()
    with pytest.raises(TimeoutError):
        TestTimeFinetuner(model).adapted(texts(1), [1]).__enter__()
    before.check()
    assert torch.is_grad_enabled()
    assert torch_settings.autocast_depth() == depth


def test_system_calls_go_on_after_a_signal_as_before() -> None:
    """`signal.signal` forgets `signal.siginterrupt`: a read would then end with EINTR."""
    libc = ctypes.CDLL(None, use_errno=True)
    reading, writing = os.pipe()
    arrived: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda signum, _: arrived.append(signum))
    try:
        signal.siginterrupt(signal.SIGALRM, False)
        with TestTimeFinetuner(plain()).adapted(texts(1), [1]):
            pass
        timer = threading.Timer(0.3, os.write, (writing, b"x"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # first: so it comes before the write
        timer.start()
        assert libc.read(reading, ctypes.create_string_buffer(1), 1) == 1
        timer.join()
        assert arrived == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.close(reading)
        os.close(writing)


WAITING = """
import signal, sys, torch, hullkit
model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
base = [p.detach().clone() for p in model.parameters()]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
try:
    with hullkit.TestTimeFinetuner(model).adapted([torch.tensor([1, 2, 3])], [2]):
        print(any(torch.equal(*pair) for pair in zip(base, model.parameters())), flush=True)
        signal.pause()
finally:
    print(all(torch.equal(*pair) for pair in zip(base, model.parameters())), flush=True)
"""


def test_a_process_that_is_told_to_end_restores_first() -> None:
    """SIGTERM with a handler that raises. Without one it ends the process and asks nobody."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"  # adapted
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert said == "True\n"
    assert process.returncode == 3
