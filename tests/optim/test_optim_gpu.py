# SPDX-License-Identifier: Apache-2.0
"""What only a device shows: capture, compilations, memory, streams; and that Triton compiles."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from _optim import KINDS, equal_bits, gpt2_shapes, odd_tensors, parameters, set_grads
from hullkit import optim
from hullkit.optim import _kernels
from torch import Tensor, nn


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, "clipped", "lr-tensor"])
def test_captured_steps_equal_eager_ones(kind: str) -> None:
    """New gradients, and a new learning rate, for every replay; eager steps before and after."""
    cls, options = optim.Adam, dict[str, Any]()
    if kind in KINDS:
        cls, _, options = KINDS[kind]
    elif kind == "clipped":
        options = {"max_grad_norm": 0.5}
    lr = torch.tensor(1e-3, device="cuda", dtype=torch.float64)
    mine = {"lr": lr} if kind == "lr-tensor" else {}
    tensors = odd_tensors(torch.float32, "cuda")
    params, others = parameters(tensors), parameters(tensors)
    captured, eager = cls(params, **(options | mine)), cls(others, **options)
    grads = [torch.empty_like(param) for param in params]  # a graph reads these addresses
    scale = torch.ones((), device="cuda")

    def set_captured_grads() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * scale

    def new_grads(seed: int) -> None:
        set_grads([others], seed)
        for grad, other in zip(grads, others, strict=True):
            grad.copy_(other.grad)

    new_grads(0)
    set_captured_grads()
    captured.step(num_steps=2)
    eager.step(num_steps=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        set_captured_grads()
        captured.step(num_steps=3)
    assert equal_bits(params, others)  # capturing runs nothing
    for call in range(1, 4):
        new_grads(call)
        if kind == "lr-tensor":
            lr.mul_(0.5)
            eager.param_groups[0]["lr"] *= 0.5
        graph.replay()
        eager.step(num_steps=3)
        assert equal_bits(params, others)
    new_grads(9)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    captured.step()
    eager.step()
    new_grads(10)
    graph.replay()
    eager.step(num_steps=3)
    assert equal_bits(params, others)


@pytest.mark.gpu
def test_captured_update_in_backward() -> None:
    models = [nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (optim.Adam(model.parameters()) for model in models)
    x = torch.randn(5, 32, device="cuda")

    def captured_pass() -> None:
        with first.update_in_backward(num_steps=2):
            models[0](x).square().sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured_pass()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_pass()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        models[1](x).square().sum().backward()
        second.step(num_steps=2)
        second.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_first_step_inside_a_capture_is_refused() -> None:
    param = nn.Parameter(torch.zeros(8, device="cuda"))
    param.grad = torch.ones(8, device="cuda")
    optimizer = optim.Adam([param])
    with (
        pytest.raises(RuntimeError, match="expected a first step on these tensors before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.gpu
def test_one_compilation_for_each_combination_of_dtypes() -> None:
    """lr, k, step, weight decay, lists and sizes change; nothing is compiled for that."""
    from hullkit.triton_kernels.adam import adam_coefficients_kernel, adam_kernel

    def compiled(kernel: Any) -> int:
        return sum(len(caches[0]) for caches in kernel.device_caches.values())

    def run(dtype: torch.dtype) -> None:
        for count, lr, k in ((1, 1.0, 1), (3, 0.1, 2), (40, 1e-5, 16), (2, 0.0, 3)):
            params = [
                nn.Parameter(torch.zeros(16 * i + count, device="cuda", dtype=dtype))
                for i in range(count)
            ]
            half = dtype is torch.float16
            optimizer = optim.AdamW(params, lr=lr, weight_decay=lr, stochastic_rounding=half)
            for call in range(3):
                set_grads([params], call)
                optimizer.step(num_steps=k + call)

    run(torch.float32)
    _kernels._compiled.clear()  # so that Triton is asked, not our own memory of its answers
    before = compiled(adam_kernel), compiled(adam_coefficients_kernel)
    run(torch.float32)
    assert (compiled(adam_kernel), compiled(adam_coefficients_kernel)) == before
    for dtype in (torch.bfloat16, torch.float16):
        count = compiled(adam_kernel)
        run(dtype)
        assert compiled(adam_kernel) <= count + 1


@pytest.mark.gpu
def test_any_stream_and_moving_gradients() -> None:
    """Steps on streams in turn, gradients at new addresses: the right ones are read."""
    tensors = odd_tensors(torch.float32, "cuda")
    params, others = parameters(tensors), parameters(tensors)
    ours, other = optim.Adam(params), optim.Adam(others)
    kept: list[Tensor] = []
    streams = [torch.cuda.Stream() for _ in range(3)]
    for call in range(6):
        set_grads([params, others], call)
        kept += [param.grad for param in params if param.grad is not None]
        stream = streams[call % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        other.step()
    assert equal_bits(params, others)


@pytest.mark.gpu
@pytest.mark.parametrize("in_backward", [False, True])
def test_peak_memory_of_a_burst(in_backward: bool) -> None:
    """124M parameters: params, state and one gradient; in backward only the largest layer's."""
    params = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in gpt2_shapes(768)]
    optimizer = optim.Adam(params)

    def burst() -> None:
        # Gradients are born in backward; no activation is larger than a scalar.
        loss = torch.stack([param.sum() for param in params]).sum()
        if in_backward:
            with optimizer.update_in_backward(num_steps=4):
                loss.backward()
        else:
            loss.backward()
            optimizer.step(num_steps=4)
            optimizer.zero_grad()

    burst()
    sizes = [param.numel() * 4 for param in params]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()  # parameters and state, and what others hold
    torch.cuda.reset_peak_memory_stats()
    burst()
    gradients = torch.cuda.max_memory_allocated() - before
    assert gradients <= (max(sizes) if in_backward else sum(sizes)) * 1.01 + (4 << 20)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    """The last elements of a tensor beyond 32-bit offsets are updated too."""
    size = 2**31 + 4099
    param = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    optim.SGD([param], lr=1.0).step(num_steps=2)
    assert bool((param == -2.0).all())


def test_kernels_compile_for_a_gpu() -> None:
    """Without one: Triton's compiler and assembler run anywhere. Accesses are 16-byte vectors."""
    compiler = pytest.importorskip("triton.compiler")
    if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
        pytest.skip("Triton before 3.3 is asked otherwise")
    script = """
        import triton
        import triton.language as tl
        from hullkit.triton_kernels.dependent_launch import gdc_wait
        from hullkit.triton_kernels.launch import KERNELS, OTHER_WARPS
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        EARLY = gdc_wait is not None  # whether this Triton can let kernels begin early

        def check_order(name, ptx):
            # A kernel that begins early touches no memory before the one before it has ended, and
            # lets the next one begin after that, which therefore waits for all kernels before.
            words = ("ld.global", "st.global", "atom.global", "red.global", "cp.async", "prefetch")
            first = min(at for at in map(ptx.find, words) if at >= 0)
            wait = ptx.find("griddepcontrol.wait")
            then = ptx.find("griddepcontrol.launch_dependents")
            assert not EARLY or 0 <= wait < min(first, then), name

        # Kernels of passes: their own constants, numbers by name, and pointers to float32.
        names = ("RMS", "BIAS", "NARROW", "FIRST", "SECOND", "MORE", "OF_WEIGHT", "ADD")
        flags = dict.fromkeys(names, True)
        flags |= {"OFFSET": 0.0, "ROUND": False, "KIND": "silu", "BACKWARD": True}
        attention = {"HALF": tl.bfloat16, "BLOCK": 64, "WIDTH": 64, "D": 64, "ROTATED": True}
        thin = {"HALF": tl.bfloat16, "R": 16, "OF_A": True, "OF_B": True, "OF_X": True, "MOST": 8}
        thin |= {"LAYERS": 3, "WHOLE": True}
        parts = ("shrink", "expand", "expand_gradient", "shrink_gradient", "shrink_gradient_few")
        names = ["low_rank_" + part for part in parts]
        of_passes = dict.fromkeys(names, thin | {"ADD": True}) | {
            "stacked_adam": {"COPY": True},
            "norm": flags | {"ROWS": 4, "BLOCK": 1024},
            "norm_gradient": flags | {"ROWS": 4, "BLOCK": 1024},
            "column_sums": flags, "add": flags, "gate": flags, "gate_gradient": flags,
            "rotary": flags | {"HALF": 32},
            "attention": attention, "attention_gradient": attention,
            "attention_q_gradient": attention, "attention_kv_gradient": attention,
        }
        numbers = ("rows", "columns", "stride", "size", "heads", "k_heads", "half", "length")
        numbers += ("group", "rank", "count")
        scalars = ("eps", "unscale", "beta1", "rest1", "beta2", "rest2")
        whole = {"broken": "*i32", "finished": "*i32"}
        for name, (kernel, _) in KERNELS.items():  # these are locals of Triton's launcher
            assert not {"params", "specialization", "options"} & {*kernel.arg_names}, name
        for name, (kernel, sizes) in KERNELS.items():
            if name not in of_passes:
                continue
            known = of_passes[name] | sizes | {"EARLY": EARLY}
            constants = {k: v for k, v in known.items() if k in kernel.arg_names}
            signature = {}
            for argument in kernel.arg_names:
                strides = argument.endswith(("_head", "_row", "_slot", "_text"))
                strides = strides or argument.rstrip("23") in numbers
                scaled = "attention" in name or "low_rank" in name
                scalar = argument in scalars or (argument == "scale" and scaled)
                kind = "i32" if strides else "fp32" if scalar else whole.get(argument, "*fp32")
                signature[argument] = "constexpr" if argument.isupper() else kind
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert "cubin" in compiled.asm, name
            check_order(name, compiled.asm["ptx"])
            print(name)
        for name, (kernel, sizes) in KERNELS.items():
            if name in of_passes:
                continue
            constants, signature, attributes = {}, {}, {}
            for place, argument in enumerate(kernel.arg_names):
                if argument.isupper():
                    constants[argument] = sizes.get(argument, tl.float32)
                    constants |= {"EARLY": EARLY} if argument == "EARLY" else {}
                    constants |= {"STOCHASTIC": False} if argument == "STOCHASTIC" else {}
                    constants |= {"COPY": tl.bfloat16} if argument == "COPY" else {}
                    constants |= {"GRADIENT": "and" in name} if argument == "GRADIENT" else {}
                    signature[argument] = "constexpr"
                elif argument in ("num_steps", "size", "rows", "stride", "columns"):
                    signature[argument] = "i32"
                    if argument in ("size", "stride", "columns"):
                        attributes[(place,)] = [["tt.divisibility", 16]]
                else:
                    floats = argument in (
                        "coefficients", "squares", "logits", "losses", "normalisers", "of_rows",
                        "scale", "values",
                    )
                    kind = "fp32" if floats else "i32" if argument == "chunks" else "i64"
                    signature[argument] = "*" + kind
                    attributes[(place,)] = [["tt.divisibility", 16]]
            source = ASTSource(
                fn=kernel, signature=signature, constexprs=constants, attrs=attributes
            )
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": OTHER_WARPS.get(name, 4), "enable_fp_fusion": False},
            )
            assert "cubin" in compiled.asm, name
            if name != "adam_coefficients":
                assert "ld.global.v4" in compiled.asm["ptx"], name
            check_order(name, compiled.asm["ptx"])
            print(name)
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 27
