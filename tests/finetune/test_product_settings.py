# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: float32 products in the passes, and torch's settings of them after it."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from _models import COUNTS, plain, texts
from _signals import raising
from hullkit.finetune import TestTimeFinetuner, adaptation
from hullkit.language_model import product_settings
from hullkit.language_model.product_settings import ProductSettings, matmul_precision

CUDA: Any = torch.backends.cuda.matmul
pytestmark = [
    pytest.mark.usefixtures("one_thread", "settings_as_torch_begins"),
    pytest.mark.skipif(not hasattr(CUDA, "fp32_precision"), reason="torch before 2.9"),
]


def backends() -> tuple[Any, ...]:
    return torch.backends, CUDA, torch.backends.mkldnn.matmul


@pytest.fixture
def settings_as_torch_begins() -> Iterator[None]:
    yield
    for backend in backends():
        backend.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in backends():
        backend.fp32_precision = "none"


def told() -> list[str]:
    return [backend.fp32_precision for backend in backends()]


def set_to(place: str, value: str) -> None:
    if place == "common":
        torch.set_float32_matmul_precision(value)
    else:
        backends()[["all", "cuda", "cpu"].index(place)].fp32_precision = value


SETTINGS = [
    ("all", "none"),
    ("all", "ieee"),
    ("all", "tf32"),
    ("cuda", "tf32"),
    ("cpu", "bf16"),
    ("common", "high"),
    ("common", "medium"),
]


@pytest.mark.parametrize(("place", "value"), SETTINGS)
def test_a_query_gives_products_their_precision_and_puts_settings_back(
    place: str, value: str
) -> None:
    model = plain()
    set_to(place, value)
    before, inside = told(), []
    model.register_forward_hook(lambda *_: inside.append(told()[1:]))
    for _ in range(2):
        with TestTimeFinetuner(model).adapted(texts(), COUNTS):
            pass
        assert told() == before
    assert not adaptation.is_adapted(model)
    assert inside
    assert {precision for now in inside for precision in now} <= {"none", "ieee"}


@pytest.mark.parametrize(("place", "value"), SETTINGS)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_what_a_pass_sets(precision: str, place: str, value: str) -> None:
    set_to(place, value)
    before = ProductSettings.now()
    with matmul_precision(precision):
        _, cuda, _ = told()
        assert (cuda == "tf32") == (precision == "tf32")
    assert ProductSettings.now() == before


def test_a_wider_setting_reaches_products_after_a_query() -> None:
    with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):
        pass
    with matmul_precision("tf32"):
        pass
    torch.backends.fp32_precision = "tf32"
    assert told() == ["tf32"] * 3
    with matmul_precision("float32"):
        assert told() == ["tf32", "ieee", "ieee"]
    torch.backends.fp32_precision = "ieee"
    assert told() == ["ieee"] * 3


def test_a_block_that_sets_them_keeps_its_own() -> None:
    with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):
        CUDA.fp32_precision = "tf32"
    assert CUDA.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_callers_autocast_stays_outside(precision: str) -> None:
    """Of the backward half too, whose products are the pass's."""
    model = plain()
    tuner = TestTimeFinetuner(model, lr=1e-2, precision=precision)
    found = []
    for on in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=on),
            tuner.adapted(texts(), COUNTS) as adapted,
        ):
            assert torch.is_autocast_enabled("cpu") == on
            found.append([p.detach().clone() for p in adapted.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def in_threads(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    assert not failures, failures


def test_blocks_of_threads_that_end_in_any_order() -> None:
    """The first keeps what was set, the last puts it back; meanwhile all have their precision."""
    torch.set_float32_matmul_precision("high")
    both = threading.Barrier(2)
    first_is_gone = threading.Event()

    def first() -> None:
        with matmul_precision("float32"):
            both.wait(20.0)
        first_is_gone.set()

    def last() -> None:
        with matmul_precision("float32"):
            both.wait(20.0)
            assert first_is_gone.wait(20.0)
            assert torch.get_float32_matmul_precision() == "highest"

    in_threads(first, last)
    assert torch.get_float32_matmul_precision() == "high"


def test_queries_of_two_threads() -> None:
    torch.set_float32_matmul_precision("high")
    both = threading.Barrier(2)
    first_is_gone = threading.Event()
    seen = []

    def first() -> None:
        model = plain()
        model.register_forward_pre_hook(lambda *_: (both.wait(20.0), None)[1])
        TestTimeFinetuner(model).adapt_(texts(1), [1])
        first_is_gone.set()

    def last() -> None:
        def wait(*_: Any) -> None:
            if not seen:
                both.wait(20.0)
                assert first_is_gone.wait(20.0)
            seen.append(torch.get_float32_matmul_precision())

        model = plain()
        model.register_forward_hook(wait)
        TestTimeFinetuner(model, refresh_interval=1).adapt_(texts(1), [3])

    in_threads(first, last)
    assert seen == ["highest"] * 3
    assert torch.get_float32_matmul_precision() == "high"


def test_another_precision_waits_and_goes_before_what_comes_later() -> None:
    held, asked, enough = (threading.Event() for _ in range(3))
    order: list[str] = []

    def note(name: str, precision: str) -> None:
        with matmul_precision(precision):
            expected = "high" if precision == "tf32" else "highest"
            assert torch.get_float32_matmul_precision() == expected
            order.append(name)

    def holds() -> None:
        with matmul_precision("tf32"):
            held.set()
            assert enough.wait(20.0)
            order.append("held")

    def waits() -> None:
        held.wait(20.0)
        asked.set()
        note("other", "float32")

    def comes_later() -> None:
        asked.wait(20.0)
        while not _someone_waits():
            pass
        enough.set()
        note("later", "tf32")

    in_threads(holds, waits, comes_later)
    assert order.index("held") < order.index("other")
    assert torch.get_float32_matmul_precision() == "highest"


def _someone_waits() -> bool:
    return bool(product_settings._waiting)


def test_a_thread_says_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_settings, "PATIENCE", 0.05)
    held, warned = threading.Event(), threading.Event()
    thread = threading.Thread(target=holds_tf32, args=(held, warned))
    thread.start()
    held.wait(20.0)

    def show(*_: Any, **__: Any) -> None:
        warned.set()

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        monkeypatch.setattr(warnings, "showwarning", show)
        with matmul_precision("float32"):
            assert warned.is_set()
            assert torch.get_float32_matmul_precision() == "highest"
    thread.join(20.0)


def holds_tf32(held: threading.Event, enough: threading.Event) -> None:
    with matmul_precision("tf32"):
        held.set()
        assert enough.wait(20.0)


def test_inner_blocks_of_two_threads_do_not_wait_for_each_other() -> None:
    """A pass of tf32 compares losses in float32 within."""
    both = threading.Barrier(2)

    def nested() -> None:
        with matmul_precision("tf32"):
            both.wait(20.0)
            for _ in range(20):
                with matmul_precision("float32"):
                    assert torch.get_float32_matmul_precision() == "highest"
                assert torch.get_float32_matmul_precision() == "high"

    in_threads(nested, nested)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_signal_ends_the_waiting() -> None:
    held, enough = threading.Event(), threading.Event()
    waiting: list[bool] = []

    def holds() -> None:
        with matmul_precision("tf32"):
            held.set()
            while not (_someone_waits() or enough.wait(0.001)):
                pass
            waiting.append(_someone_waits())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            assert enough.wait(20.0)

    thread = threading.Thread(target=holds)
    thread.start()
    held.wait(20.0)
    with raising(signal.SIGALRM, TimeoutError):
        try:
            with pytest.raises(TimeoutError):
                TestTimeFinetuner(plain()).adapt_(texts(1), [1])
        finally:
            enough.set()
            thread.join(20.0)
    assert waiting == [True]
    assert torch.get_float32_matmul_precision() == "highest"
    in_threads(lambda: TestTimeFinetuner(plain()).adapt_(texts(1), [1]) and None)


@pytest.mark.parametrize("delay", range(60))
def test_a_signal_that_comes_as_the_waiting_begins(delay: int) -> None:
    """Python tells of it at the end of a wait alone."""

    def holds(held: threading.Event, enough: threading.Event) -> None:
        with matmul_precision("tf32"):
            held.set()
            while not product_settings._waiting and not enough.is_set():
                pass
            for _ in range(delay):
                pass
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            assert enough.wait(20.0)

    for _ in range(5):
        held, enough = threading.Event(), threading.Event()
        thread = threading.Thread(target=holds, args=(held, enough))
        thread.start()
        held.wait(20.0)
        with raising(signal.SIGALRM, TimeoutError):
            try:
                with pytest.raises(TimeoutError), matmul_precision("float32"):
                    pass
            finally:
                enough.set()
                thread.join(20.0)


# Python warns of forks beside threads; the child starts none.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_does_not_wait_for_threads_that_it_has_not() -> None:
    held, enough = threading.Event(), threading.Event()

    thread = threading.Thread(target=holds_tf32, args=(held, enough))
    thread.start()
    held.wait(20.0)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        with matmul_precision("float32"):
            right = torch.get_float32_matmul_precision() == "highest"
        os._exit(0 if right else 1)
    enough.set()
    thread.join(20.0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_block_that_was_never_left_is_ended_with_the_query() -> None:
    """As after a signal in the last line of one."""
    kept = ExitStack()
    model = plain()
    model.register_forward_pre_hook(lambda *_: kept.enter_context(matmul_precision("tf32")))
    model.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        TestTimeFinetuner(model).adapt_(texts(1), [1])
    assert torch.get_float32_matmul_precision() == "highest"
    kept.close()
    assert torch.get_float32_matmul_precision() == "highest"
