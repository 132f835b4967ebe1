"""Passes as CUDA graphs: recorded once for each shape of an example, and replayed."""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..language_model.fused_modules import fused_head_weight
from ..language_model.interface import longest_padded
from ..language_model.loss import CausalLoss, matmul_precision
from ..language_model.pass_copies import PassCopies, autocast_weights, narrowed_tensors
from ..language_model.saved_tensors import Packed, Saved
from ..native.torch_private import StorageWatch, watch_storage
from ..optim._record import AdamOptions
from .base_weights import NotCapturable, Weights
from .captured_updates import GroupedUpdates
from .padding import Inputs, bucket, padded
from .rounding import Rounding
from .schedule import Reuse
from .snapshot import Attributes

MAX_GRAPHS = 32
_COMPILED_WARMUPS = 2  # the first compiles, the second tunes
_PADDING_TOLERANCE = 1e-4  # relative, between losses with and without a masked tail
Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


class CapturedPasses:
    """Graphs of a model's passes and their updates. All graphs share one pool of memory.

    loss_of: computes the loss of one example's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        model_tensors: list[Tensor],
        parameters: list[nn.Parameter],
        loss_of: CausalLoss,
        *,
        host_snapshot: bool,
        rounding: Rounding,
    ) -> None:
        self._model = model
        self._loss_of = loss_of
        self.copies = _copies(model, loss_of)
        self.weights = Weights(
            parameters, host=host_snapshot, copies=self.copies, rounding=rounding
        )
        self._tensors = _addresses(model_tensors)
        self._capacity = 64
        self._longest = longest_padded(model)
        self._padding_checked = False
        self._stream = _capture_stream(self.weights.device)
        _take_workspaces(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._reserved = 0  # bytes of the pool that were allocated in one piece
        self._passes: OrderedDict[Shape, _Pass] = OrderedDict()

    def fits(self, model_tensors: list[Tensor]) -> bool:
        """Whether the graphs still read and write these tensors of the model."""
        return _addresses(model_tensors) == self._tensors

    def prepare(
        self, examples: dict[int, Inputs], most_steps: int
    ) -> dict[int, tuple[_Pass, Inputs]]:
        """Each example's pass, recorded now if it is new, and its inputs on the device.

        Recording runs the model, which may write its buffers: the caller restores them afterwards.

        Raises NotCapturable; torch.OutOfMemoryError.
        """
        self.copies.refresh()
        if most_steps > self._capacity:
            self._passes.clear()
            self._reserved = 0
            self._capacity = 1 << (most_steps - 1).bit_length()
        # The longest comes first: the passes of the others fit into its memory.
        by_size = sorted(examples, key=lambda i: -examples[i]["input_ids"].numel())
        return {i: self._of(examples[i]) for i in by_size}

    def _of(self, inputs: Inputs) -> tuple[_Pass, Inputs]:
        if inputs.keys() == {"input_ids", "labels"}:
            length = bucket(inputs["input_ids"].shape[1], self._longest)
            if length > inputs["input_ids"].shape[1] and not self._padding_checked:
                self._check_padding(inputs, length)
                length = bucket(inputs["input_ids"].shape[1], self._longest)
            inputs = padded(inputs, length)
        device = self.weights.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        shape = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        known = self._passes.get(shape)
        if known is None:
            while len(self._passes) >= MAX_GRAPHS:
                self._passes.popitem(last=False)
            known = self._passes[shape] = self._record(inputs)
        self._passes.move_to_end(shape)
        return known, inputs

    def _check_padding(self, inputs: Inputs, length: int) -> None:
        """Turns padding off if a masked tail changes the model's loss."""
        # With autocast the copies stand for its casts; the plain model runs without autocast.
        own = nullcontext() if self._loss_of.autocast else self.copies.in_place()
        with torch.no_grad(), self._apart(), own:
            alone = self._loss_of.plain(inputs).double().item()
            try:
                masked = self._loss_of.plain(padded(inputs, length)).double().item()
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the padded sequence may be too long for the model
                masked = float("nan")
        if not abs(alone - masked) <= _PADDING_TOLERANCE * abs(alone):
            self._longest = 0
        self._padding_checked = True

    def _record(self, inputs: Inputs) -> _Pass:
        slots = [dict(module._buffers) for module in self._model.modules()]
        reason = ""
        try:
            with self._apart(), self.copies.in_place():
                recorded = _Pass(self, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The error is not kept: its frames hold tensors, which hold memory of the stream.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason:
            raise NotCapturable(reason)
        for before, module in zip(slots, self._model.modules(), strict=True):
            if [*map(id, before.values())] != [*map(id, module._buffers.values())]:
                raise NotCapturable("forward replaces a buffer instead of writing to it")
        return recorded

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside the block work goes to the stream of captures, which may use all free memory."""
        current = torch.cuda.current_stream(self.weights.device)
        self._stream.wait_stream(current)
        torch.cuda.empty_cache()  # the allocator gives no block of one stream to another
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _reserve(self, num_bytes: int) -> None:
        """Takes memory for a whole pass in one piece, as its capture begins.

        Piece by piece the pool would grow to twice as much: it keeps gaps that small tensors leave
        and no large tensor fits into.
        """
        missing = num_bytes - self._reserved
        if missing > 0:
            torch.empty(missing, dtype=torch.uint8, device=self.weights.device)
            self._reserved = num_bytes

    def run(
        self, passes: dict[int, tuple[_Pass, Inputs]], schedule: list[Reuse], options: AdamOptions
    ) -> list[tuple[float, bool]]:
        """Each burst's loss, and whether all its gradients were finite. Waits for the device."""
        for recorded in {id(p): p for p, _ in passes.values()}.values():
            recorded.updates.set_options(options)
        results = torch.zeros(len(schedule), 2, dtype=torch.float64, device=self.weights.device)
        for result, (example, num_steps) in zip(results.unbind(), schedule, strict=True):
            recorded, inputs = passes[example]
            recorded.replay(inputs, num_steps, result)
        return [(loss, broken == 0.0) for loss, broken in results.tolist()]


class _Pass:
    """One graph: forward pass, backward pass, and each group's updates when its gradients exist."""

    def __init__(self, owner: CapturedPasses, inputs: Inputs) -> None:
        parameters = owner.weights.parameters
        # The graph reads these at every replay and does not keep them alive; this object does.
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._result = torch.zeros(2, dtype=torch.float64, device=owner.weights.device)
        order, held = _warm_up(owner, self._inputs)
        # A model may replace a tensor that it keeps as an attribute; the graph reads the old one.
        self._tables = Attributes(list(owner._model.modules())).tensors
        self.updates = GroupedUpdates(owner.weights, order, owner._capacity)
        self._graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        collecting = gc.isenabled()
        gc.disable()  # collecting another graph during a capture would end the capture
        try:
            with torch.cuda.graph(
                self._graph,
                pool=owner._pool,
                stream=owner._stream,
                capture_error_mode="thread_local",
            ):
                try:  # after a failure the end of the capture raises, too, and hides the reason
                    owner._reserve(held)
                    self.updates.begin()
                    with _hooks(parameters, self.updates.ready):
                        loss = owner._loss_of(self._inputs, Saved(), owner.copies)
                        loss.backward()
                    self.updates.join()
                    self._result[0].copy_(loss.detach())
                    self._result[1].copy_(self.updates.broken())
                except BaseException as error:
                    failure = error
                    with suppress(Exception):  # a capture must not end with streams apart
                        self.updates.join()
        except Exception as error:
            failure = failure or error
        finally:
            if collecting:
                gc.enable()
        try:
            if failure is not None:
                raise failure
            self.updates.set_gradients()
            self.fused = owner._loss_of.fused
        finally:
            failure = None  # the error holds this frame, and the frame holds the pass's tensors
            _drop_gradients(parameters)  # their memory stays in the graph's pool

    def replay(self, inputs: Inputs, num_steps: int, result: Tensor) -> None:
        for name, tensor in self._inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        self.updates.set_num_steps(num_steps)
        self._graph.replay()
        result.copy_(self._result)


@contextmanager
def _hooks(parameters: list[nn.Parameter], ready: Callable[[nn.Parameter], None]) -> Iterator[None]:
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


def _copies(model: nn.Module, loss_of: CausalLoss) -> PassCopies:
    """The copies that captured passes read: narrowed tensors, and weights that autocast would cast.

    The last layer's weight stays in place where the loss multiplies with it, since its gradient is
    summed in float32.
    """
    narrowed = narrowed_tensors(model)
    if not loss_of.autocast or loss_of.compiled:  # the compiler fuses casts with what reads them
        return PassCopies(narrowed)
    head = fused_head_weight(model) if loss_of.fuses else None
    replaced = dict.fromkeys((*narrowed, *autocast_weights(model)))
    if head is None or head.dtype is not torch.float32:
        return PassCopies(replaced)
    replaced.pop(head, None)
    return PassCopies(replaced, [head])


def _warm_up(owner: CapturedPasses, inputs: Inputs) -> tuple[dict[nn.Parameter, torch.dtype], int]:
    """Passes before a capture, so that everything lazy is done.

    Returns the dtype of each parameter's gradient, in the order in which gradients come, and the
    bytes that a pass holds at a time; 0 with the compiler, which plans memory itself.
    """
    order: dict[nn.Parameter, torch.dtype] = {}
    with _hooks(owner.weights.parameters, functools.partial(_note, order)):
        if owner._loss_of.compiled:
            for _ in range(_COMPILED_WARMUPS):
                order.clear()
                owner._loss_of(inputs).backward()
            return order, 0
        offloaded = _Offloaded(owner._model)
        owner._loss_of(inputs, offloaded, owner.copies).backward()
    # A pass holds most as its backward half begins: all saved tensors, and a little more for gaps
    # between them. Gradients of whole matrices get pieces of their own.
    return order, offloaded.num_bytes + offloaded.num_bytes // 16


class _Offloaded(Saved):
    """Keeps saved tensors on the host and adds up their size on the device.

    So a warm-up needs little memory, before a pass has its memory in one piece. The model's own
    tensors stay on the device and do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.num_bytes = 0
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
        return functools.partial(tensor.cpu().to, tensor.device)


def _note(order: dict[nn.Parameter, torch.dtype], parameter: nn.Parameter) -> None:
    """Notes the dtype of the parameter's gradient, and frees the gradient."""
    assert parameter.grad is not None
    order[parameter] = parameter.grad.dtype
    parameter.grad = None


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _addresses(tensors: list[Tensor]) -> list[Any]:
    """The facts of a model that a graph depends on: where tensors lie, and which are trained."""
    return [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of passes. It goes before the updates' where both have work.

    There is one for all models, as with `side_stream`.
    """
    return torch.cuda.Stream(device, priority=-1)


def _take_workspaces(stream: torch.cuda.Stream) -> None:
    """Has torch take its workspace for matrix products on this stream.

    torch keeps it for ever. Taken later it would lie within a large piece of memory, which could
    then not be given back.
    """
    with torch.cuda.stream(stream), matmul_precision("float32"):
        matrix = torch.zeros(8, 8, device=stream.device, requires_grad=True)
        (matrix @ matrix).sum().backward()
