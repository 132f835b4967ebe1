# SPDX-License-Identifier: Apache-2.0
"""Where captured passes run, the memory they take, and the passes that a capture needs first."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..language_model.loss import CausalLoss, check_depends
from ..language_model.pass_copies import PassCopies
from ..language_model.product_settings import matmul_precision
from ..language_model.products import WeightProducts
from ..language_model.recent_tensors import has_hooks
from ..language_model.saved_tensors import Packed, Saved
from ..native.torch_private import StorageWatch, watch_storage
from ..optim._products import is_product
from .activations import ActivationPlan, ActivationsTooLarge
from .padding import Inputs

# The part of a device that is left for gradients, workspaces and what others need.
_MARGIN = 1 / 16
_COMPILED_WARMUPS = 2  # the first compiles, the second tunes


class NotCapturable(Exception):
    """A model's passes cannot be recorded; the message says why."""


class CaptureMemory:
    """A stream for captures, and one pool of memory for all graphs of a model."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _capture_stream(device)
        _take_workspaces(self.stream)
        self.renew()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a pool of its own."""
        return CaptureMemory, (self.stream.device,)

    def renew(self) -> None:
        """Takes a new pool for the next graphs. A graph that failed leaves the old one unusable."""
        self.pool = torch.cuda.graph_pool_handle()
        self._reserved = 0  # bytes of the pool that were allocated in one piece

    def free(self) -> int:
        """Bytes of the device that a pass may take beside the pool."""
        return free_bytes(self.stream.device)

    @property
    def reserved(self) -> int:
        """Bytes of the pool that every pass can use."""
        return self._reserved

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside the block work goes to the stream of captures, which may use all free memory."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        torch.cuda.empty_cache()  # the allocator gives no block of one stream to another
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, held: int, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `body` launches. Work on the stream must be done before.

        held: bytes of the pool that are taken in one piece first.
        """
        graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        collecting = gc.isenabled()
        gc.disable()  # collecting another graph during a capture would end the capture
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                try:  # after a failure the end of the capture raises, too, and hides the reason
                    self.reserve(held)
                    body()
                except BaseException as error:
                    failure = error
        except Exception as error:
            failure = failure or error
        finally:
            if collecting:
                gc.enable()
        try:
            if failure is not None:
                self._end_captures()
                raise failure
        finally:
            failure = None  # the error holds this frame, and its frames hold a pass's tensors
        return graph

    def _end_captures(self) -> None:
        """After a capture that was broken off, the generator of some versions of torch still counts
        as captured, and refuses to draw. A capture of nothing ends that."""
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is empty
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"
            ):
                pass

    def reserve(self, num_bytes: int) -> None:
        """Takes memory for a whole pass in one piece, as its capture begins.

        Piece by piece the pool would grow to twice as much: it keeps gaps that small tensors leave
        and no large tensor fits into.
        """
        missing = num_bytes - self._reserved
        if missing > 0:
            torch.empty(missing, dtype=torch.uint8, device=self.stream.device)
            self._reserved = num_bytes


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody has taken, less what is left for others."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(total * _MARGIN))


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of passes. It goes before the updates' where both have work.

    There is one for all models, as with `update_stream`.
    """
    return torch.cuda.Stream(device, priority=-1)


@functools.cache
def update_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of updates. There is one for all models: torch keeps memory for every stream."""
    return torch.cuda.Stream(device)


def _take_workspaces(stream: torch.cuda.Stream) -> None:
    """Has torch take its workspace for matrix products on this stream.

    torch keeps it for ever. Taken later it would lie within a large piece of memory, which could
    then not be given back.
    """
    with torch.cuda.stream(stream), matmul_precision("float32"):
        matrix = torch.zeros(8, 8, device=stream.device, requires_grad=True)
        (matrix @ matrix).sum().backward()


@contextmanager
def hooks(parameters: list[nn.Parameter], ready: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Inside the block `ready(parameter)` is called when a parameter's gradient is complete."""
    hook: Any = ready
    handles: list[Any] = []
    try:  # Ctrl-C may come between two registrations
        for parameter in parameters:
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Gradient(NamedTuple):
    """A parameter's gradient, as it was in a warm-up.

    is_product: whether it was the product of one linear layer, and nothing else.
    is_taken: whether it was one that `NotedGradients.take_gradient` took, and nothing else.
    """

    dtype: torch.dtype
    is_product: bool
    is_taken: bool


class NotedGradients(WeightProducts):
    """The gradients of a pass, in their order. Each is freed once it is noted."""

    def __init__(self) -> None:
        self.order: dict[nn.Parameter, Gradient] = {}
        # Where a product lies, and its version; None for a weight of several.
        self._products: dict[Tensor, tuple[int, int] | None] = {}

    def clear(self) -> None:
        self.order.clear()
        self._products.clear()

    def made(self, weight: Tensor, a: Tensor, b: Tensor, gradient: Tensor) -> None:
        once = weight not in self._products and is_product(a, b, gradient)
        # Autograd copies a gradient that somebody else holds.
        self._products[weight] = (gradient.data_ptr(), gradient._version) if once else None

    def take_gradient(self, factor: Tensor, gradient: Tensor) -> bool:
        """Takes it as a capture will, so that the warm-up runs the same kernels."""
        if not isinstance(factor, nn.Parameter) or _is_watched(factor):
            return False
        first = factor not in self.order
        self.order[factor] = Gradient(gradient.dtype, is_product=False, is_taken=first)
        return True

    def note(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None and parameter in self.order:
            return  # autograd tells of a gradient that was taken, too
        assert gradient is not None
        # Another gradient that was added in place, or a hook, would have changed the version.
        alone = self._products.get(parameter) == (gradient.data_ptr(), gradient._version)
        product = alone and not _is_watched(parameter)
        self.order[parameter] = Gradient(gradient.dtype, product, is_taken=False)
        parameter.grad = None


def _is_watched(parameter: Tensor) -> bool:
    """Whether somebody but `hooks` waits for the parameter's gradient."""
    told: Any = parameter._post_accumulate_grad_hooks
    return has_hooks(parameter) or len(told or ()) > 1


def warm_up(
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss_of: CausalLoss,
    inputs: Inputs,
    copies: PassCopies,
    memory: CaptureMemory,
    plan: ActivationPlan,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[dict[nn.Parameter, Gradient], int]:
    """Passes before a capture, so that everything lazy is done.

    plan: it learns here whether the pass must compute activations again.
    forward: a block around the forward half, which the compiler's passes go without.
    Returns each parameter's gradient, in the order in which gradients come, and the bytes that a
    pass holds at a time; 0 with the compiler, which plans memory itself.
    """
    noted = NotedGradients()
    with hooks(parameters, noted.note):
        if loss_of.compiled:
            for _ in range(_COMPILED_WARMUPS):
                noted.clear()
                loss = loss_of(inputs)
                check_depends("pass", loss)
                loss.backward()
            return noted.order, 0
        try:
            held = _pass(model, loss_of, inputs, copies, memory, plan, forward, noted)
        except ActivationsTooLarge:
            plan.note_too_large(inputs)
            held = None
        if held is None:  # the error is gone, and with it the tensors that its frames held
            noted.clear()
            held = _pass(model, loss_of, inputs, copies, memory, plan, forward, noted)
    return noted.order, with_gaps(held)


def _pass(
    model: nn.Module,
    loss_of: CausalLoss,
    inputs: Inputs,
    copies: PassCopies,
    memory: CaptureMemory,
    plan: ActivationPlan,
    forward: Callable[[], AbstractContextManager[None]],
    noted: NotedGradients,
) -> int:
    """One pass; returns the bytes that it held. It may raise ActivationsTooLarge."""
    room = memory.free()
    most = room + memory.reserved if plan.may_recompute(inputs) else None
    held = HeldTensors(model, room, most)
    with forward():
        loss = loss_of(inputs, held, copies, recompute=plan.recomputes(inputs), products=noted)
    check_depends("pass", loss)
    loss.backward()
    return held.num_bytes


def with_gaps(held: int) -> int:
    """The bytes of a pass that saves so many.

    A pass holds most as its backward half begins: all saved tensors, and a little more for gaps
    between them. Gradients of whole matrices get pieces of their own.
    """
    return held + held // 16


class HeldTensors(Saved):
    """Keeps saved tensors of a warm-up, and adds up their size.

    Those beyond `room` bytes lie on the host meanwhile: a pool of earlier passes may hold most of
    the device, and the pass will use that pool. The model's own tensors do not count.

    most: the bytes with which ActivationsTooLarge is raised; None for no limit.
    """

    def __init__(self, model: nn.Module, room: int, most: int | None) -> None:
        super().__init__()
        self.num_bytes = 0
        self._room, self._most = room, most
        own = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._counted: dict[int, StorageWatch] = {}

    def keep(self, tensor: Tensor) -> Packed:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._own:
            return tensor
        counted = self._counted.get(address)
        if counted is None or counted.expired():  # else the address belongs to a known tensor
            self._counted[address] = watch_storage(storage)
            self.num_bytes += storage.nbytes()
            if self._most is not None and self.num_bytes > self._most:
                raise ActivationsTooLarge
        if self.num_bytes <= self._room:
            return tensor
        return functools.partial(tensor.cpu().to, tensor.device)
