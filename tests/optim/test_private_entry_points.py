# SPDX-License-Identifier: Apache-2.0
"""Entry points of torch and Triton that are not public: used where present, else done without."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hullkit
import pytest
import torch
import torch.nn.functional as F
from hullkit import optim
from hullkit.language_model.saved_tensors import Saved
from hullkit.native import torch_private
from hullkit.optim import _kernels, _triton_launch, _watched
from hullkit.optim._tensor_table import TensorTable
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

PRIVATE = re.compile(
    r"torch\._(?!_version__|_future__)|Tensor\._(?!_torch_dispatch__|_getitem__|_setitem__)|torch_optimizer\._|\._C\b"
    r"|import _global|packed_metadata|__dlpack_c|StorageWeakRef|triton\.(runtime|compiler|backends)"
)
ONLY_IN = {"native/torch_private.py", "optim/_triton_launch.py"}


def test_nothing_else_calls_them() -> None:
    root = Path(hullkit.__file__).parent
    for path in root.rglob("*.py"):
        code = ast.parse(path.read_text())
        for node in ast.walk(code):  # docstrings may name what is private
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        if PRIVATE.search(ast.unparse(code)):
            assert str(path.relative_to(root)) in ONLY_IN


def again() -> Any:
    """The module as a torch that is as now would have it."""
    assert torch_private.__file__ is not None
    name = f"{torch_private.__name__}_again"
    spec = importlib.util.spec_from_file_location(name, torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# torch's raw stream


def test_raw_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 3)
    name = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, name, lambda index: 100 + index, raising=False)
    assert again().raw_stream(device) == 103
    monkeypatch.delattr(torch._C, name)
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: stream if of == device else None)
    assert again().raw_stream(device) == 7


@pytest.mark.gpu
def test_raw_stream_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream), monkeypatch.context() as patch:
            known = torch_private.raw_stream(device)
            patch.delattr(torch._C, "_cuda_getCurrentRawStream")
            assert known == again().raw_stream(device) == stream.cuda_stream


# Who looks on while an optimizer steps


def test_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not again().profiler_enabled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert again().profiler_enabled()
    monkeypatch.delattr(torch._C._autograd, "_profiler_enabled")
    assert again().profiler_enabled()  # it may be


@pytest.mark.parametrize("name", ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"])
def test_hooks_of_all_optimizers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pre, post = again().step_hooks
    assert pre is torch_optimizer._global_optimizer_pre_hooks
    assert post is torch_optimizer._global_optimizer_post_hooks
    monkeypatch.delattr(torch_optimizer, name)
    assert again().step_hooks is None


@pytest.mark.parametrize("missing", ["nothing", "profiler", "hooks"])
def test_steps_and_their_hooks(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same updates, and each hook once for a step, whatever torch tells."""
    if missing == "profiler":
        monkeypatch.setattr(_watched, "profiler_enabled", torch_private._always)
    elif missing == "hooks":
        monkeypatch.setattr(_watched, "step_hooks", None)
        monkeypatch.setattr(_watched, "_pre_hooks", {})
        monkeypatch.setattr(_watched, "_post_hooks", {})
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, other = optim.Adam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    assert _watched.watched(optimizer) is (missing != "nothing")
    calls: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: calls.append("post")),
        optimizer.register_step_post_hook(lambda *_: calls.append("own")),
    ]
    try:
        for way in range(3):
            grad = torch.arange(3.0) - way
            calls.clear()
            if way == 0:
                ours.grad = grad
                optimizer.step()
            elif way == 1:
                optimizer.step_with({ours: grad})
            else:
                ours.grad = None
                with optimizer.update_in_backward():
                    (ours * grad).sum().backward()
            assert calls == ["pre", "own", "post"]
            theirs.grad = grad
            other.step()
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    finally:
        for handle in handles:
            handle.remove()


# Lists of tensors, and DLPack's functions


@pytest.mark.parametrize("present", [True, False])
def test_lists_of_tensors(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("_foreach_copy_", "_foreach_zero_", "_foreach_norm"):
        if present:
            own = getattr(torch, name)
            monkeypatch.setattr(
                torch, name, lambda *a, own=own, name=name: (called.append(name), own(*a))[1]
            )
        else:
            monkeypatch.delattr(torch, name)
    sources = [torch.arange(6.0).view(2, 3).t(), torch.full((2,), -3.0)]
    targets = [torch.empty(3, 2, dtype=torch.bfloat16), torch.empty(2)]
    torch_private.foreach_copy_(targets, sources)
    assert [t.tolist() for t in targets] == [s.tolist() for s in sources]
    norms = torch_private.foreach_norm(sources, 2)
    assert [n.item() for n in norms] == pytest.approx([55.0**0.5, 18.0**0.5])
    assert [n.item() for n in torch_private.foreach_norm(sources, torch.inf)] == [5.0, 3.0]
    torch_private.foreach_zero_(targets)
    assert not any(bool(t.any()) for t in targets)
    assert sorted(set(called)) == (
        ["_foreach_copy_", "_foreach_norm", "_foreach_zero_"] if present else []
    )


def test_dlpack_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """How steps do without is in test_optim_changes.py."""
    table = object()
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", table, raising=False)
    assert torch_private.dlpack_exchange() is table
    monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__")
    assert torch_private.dlpack_exchange() is None


def test_memory_that_may_have_been_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's reference an activation is saved instead of computed again."""
    kept: list[bool] = []
    for present in (True, False):
        if not present:
            monkeypatch.delattr(torch.multiprocessing.reductions, "StorageWeakRef")
        memory = torch.zeros(3)
        watch = torch_private.watch_storage(memory.untyped_storage())
        assert watch.expired() is not present
        del memory
        assert watch.expired()
        saved = Saved()
        x = torch.linspace(-1.0, 1.0, 5, requires_grad=True)
        with monkeypatch.context() as patch, saved.hooks():
            patch.setattr(saved, "keep", lambda tensor, way=present: kept.append(way) or tensor)
            y = saved.cheap(F.silu, x * 1.0)
            (y * y).sum().backward()
        assert x.grad is not None
        want = torch.autograd.grad(F.silu(x).square().sum(), x)[0]
        torch.testing.assert_close(x.grad, want)
    assert kept.count(True) < kept.count(False)


# Triton's launcher


class Compiled:
    """A kernel as Triton has compiled it, as far as a launch goes."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def triton_version(monkeypatch: pytest.MonkeyPatch) -> Any:
    import triton

    return lambda version: monkeypatch.setattr(triton, "__version__", version)


def test_launcher(monkeypatch: pytest.MonkeyPatch, triton_version: Any) -> None:
    triton_version("3.3.1")
    monkeypatch.setattr(_triton_launch, "raw_stream", lambda device: 40 + device.index)
    compiled, tensor = Compiled(), torch.zeros(1)
    launch = _triton_launch.launcher(compiled, ("constant",), torch.device("cuda", 2))
    assert launch is not None
    launch(5, (tensor, 9))
    first = (5, 1, 1, 42, "function", "metadata", None, None, None)
    assert compiled.launched == [(*first, tensor.data_ptr(), 9, "constant")]


@pytest.mark.parametrize("name", ["run", "function", "packed_metadata"])
def test_a_kernel_without_a_launcher(name: str) -> None:
    compiled: Any = Compiled()
    held = {key: getattr(compiled, key) for key in ("run", "function", "packed_metadata")}
    del held[name]
    device = torch.device("cuda", 0)
    assert _triton_launch.launcher(SimpleNamespace(**held), (), device) is None
    assert _triton_launch.launcher(None, (), device) is None


@pytest.mark.parametrize(("version", "direct"), [("3.2.0", False), ("3.3.1", True), ("3.10", True)])
def test_triton_whose_launcher_takes_no_constants(
    version: str, direct: bool, triton_version: Any
) -> None:
    triton_version(version)
    launch = _triton_launch.launcher(Compiled(), (), torch.device("cuda", 0))
    assert (launch is not None) is direct


def test_the_launcher_is_called_as_triton_does() -> None:
    """The order of its arguments in the Triton that is installed."""
    import triton
    from triton.runtime.jit import JITFunction

    if triton.__version__.startswith("3.2."):
        pytest.skip("its launcher takes no constants, and is left alone")
    tree = ast.parse(textwrap.dedent(inspect.getsource(JITFunction.run)))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "kernel.run"
    ]
    given = [ast.unparse(argument) for argument in call.args]
    assert given[:6] == [
        *("grid_0", "grid_1", "grid_2", "stream", "kernel.function", "kernel.packed_metadata")
    ]
    assert given[6] == "launch_metadata"
    assert [name.rpartition(".")[2] for name in given[7:9]] == [
        "launch_enter_hook",
        "launch_exit_hook",
    ]
    assert given[9:] == ["*bound_args.values()"]
    assert not call.keywords


@pytest.mark.parametrize("direct", [True, False])
def test_later_launches(direct: bool, monkeypatch: pytest.MonkeyPatch, triton_version: Any) -> None:
    """Triton is asked once, or every time if there is no other way."""
    from hullkit.triton_kernels import launch as launch_module

    triton_version("3.3.1")
    compiled = Compiled() if direct else None
    asked: list[int] = []

    def launch(name: str, programs: int, *_: Any) -> tuple[Any, tuple[Any, ...]]:
        asked.append(programs)
        return compiled, ("constant",)

    monkeypatch.setattr(launch_module, "launch", launch)
    monkeypatch.setattr(_kernels, "_compiled", {})
    monkeypatch.setattr(_triton_launch, "raw_stream", lambda device: 0)
    table = TensorTable([(0, 0, 0, 0, 1, 0)], torch.device("cpu"), triton=False)
    for programs in (3, 4, 5):
        _kernels._run("a kernel", table, programs, 17)
    if compiled is None:
        assert asked == [3, 4, 5]
    else:
        assert asked == [3]
        assert [(words[0], words[-2:]) for words in compiled.launched] == [
            (4, (17, "constant")),
            (5, (17, "constant")),
        ]


@pytest.mark.gpu
def test_both_ways_of_launching_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for direct in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(_kernels, "_compiled", {})
            if not direct:
                patch.setattr(_kernels, "launcher", lambda *_: None)
            param = nn.Parameter(torch.linspace(-1.0, 1.0, 5000, device="cuda"))
            optimizer = optim.AdamW([param], lr=0.1)
            for call in range(4):
                param.grad = torch.full_like(param, 0.5 - call)
                optimizer.step(num_steps=1 + call)
            assert bool(_kernels._compiled) is direct
            results.append(param.detach())
    assert torch.equal(*results)
