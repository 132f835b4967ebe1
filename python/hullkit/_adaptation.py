"""The way into an adapted model and, whatever happens, the way back."""

from __future__ import annotations

import signal
import threading
import weakref
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._report import AdaptReport, Clock, PhaseSeconds, peak_memory
from ._weights import Weights, pinned_like
from .schedule import Reuse

if TYPE_CHECKING:
    from .finetune import TestTimeFinetuner


class Adaptation:
    """One with-block of `TestTimeFinetuner.adapted`.

    A class and not a generator: a Ctrl-C may arrive between a generator's yield and the block, or
    as `__exit__` is called, before its first line, where no try can catch it. So from entry to exit
    SIGINT comes here first: in the block and in the passes it is handed on at once, elsewhere in
    this class it is held back, and sent again when the model is restored.
    """

    def __init__(
        self,
        tuner: TestTimeFinetuner,
        inputs: list[dict[str, Tensor]],
        schedule: list[Reuse],
        select_seconds: float | None,
    ) -> None:
        self._tuner = tuner
        self._inputs = inputs
        self._schedule = schedule
        self._select_seconds = select_seconds
        self._entered = False
        self._claimed: list[nn.Module] = []
        self._snapshot: Snapshot | None = None
        self._next_handler: Any = None
        self._held_back = False

    def __enter__(self) -> nn.Module:
        if self._entered:
            raise RuntimeError("adapted(): expected one with-block for each call, got a second one")
        self._entered = True
        try:
            self._intercept_sigint()
            self._run()
            return self._tuner.model
        except BaseException:
            self._finish()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._finish()

    def keep(self) -> None:
        """Enter, and stay adapted: trained weights and buffers are left as the passes left them."""
        self.__enter__()
        assert self._snapshot is not None
        self._snapshot.forget_values()
        self._finish()

    def _run(self) -> None:
        tuner = self._tuner
        self._claim_model()
        self._send_held_back()
        tuner.last_report = None
        clock = Clock(_device(tuner.model))
        with torch.inference_mode(False), torch.enable_grad():
            parameters, buffers = tensors_of(self._claimed)
            graphs = tuner._graphs(parameters, buffers)
            # Nothing is written before it is complete.
            weights = None if graphs is None else graphs.weights
            self._snapshot = snapshot = Snapshot(
                self._claimed, parameters, buffers, tuner.snapshot, weights
            )
            for module in self._claimed:
                # The flag itself, not .eval(): that may be overridden to do more (merge adapters).
                if module.training:
                    module.training = False
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = None
            losses, captured = tuner._run(snapshot, graphs, self._inputs, self._schedule, clock)
        seconds = clock.seconds()
        tuner.last_report = AdaptReport(
            num_updates=sum(burst.num_steps for burst in self._schedule)
            if tuner.mode == "reuse"
            else min(1, len(losses)),
            num_passes=len(losses),
            losses=tuple(losses),
            seconds=PhaseSeconds(
                select=self._select_seconds,
                prepare=seconds.get("prepare", 0.0),
                passes=seconds.get("passes", 0.0),
                updates=seconds.get("updates"),
                restore=None,
            ),
            peak_memory=peak_memory(clock.device),
            path="captured" if captured else "eager",
            reason=None if captured else tuner._eager_reason(clock.device),
        )

    def _finish(self) -> None:
        """Undo all of __enter__, as far as it got."""
        error: BaseException | None = None
        clock: Clock | None = None
        if self._tuner.last_report is not None:
            with suppress(RuntimeError):  # a lost device; restoring tells
                clock = Clock(_device(self._tuner.model))
        while self._snapshot is not None:
            try:
                self._snapshot.restore()
            except Exception as failure:  # a lost device, say: another attempt would fail as well
                error = failure
            except BaseException as interrupt:  # an exit from another signal's handler: go on
                error = interrupt
                continue
            self._snapshot = None
        _ADAPTED.difference_update(self._claimed)
        if error is None and clock is not None:
            try:
                self._report_restore(clock)
            except Exception as failure:  # of the device, told only now
                error = failure
        self._release_sigint()
        if error is not None:
            raise error

    def _report_restore(self, clock: Clock) -> None:
        report = self._tuner.last_report
        assert report is not None
        clock.lap("restore")
        seconds = report.seconds._replace(restore=clock.seconds()["restore"])
        self._tuner.last_report = report._replace(seconds=seconds)

    def _claim_model(self) -> None:
        # Modules, not only the model: a wrapper or a part of it shares its weights.
        modules = list(self._tuner.model.modules())
        with _LOCK:
            if any(module in _ADAPTED for module in modules):
                raise RuntimeError(
                    "adapted(): expected a model that is not being adapted, got one inside an "
                    "adapted() block of this tuner or of one that shares modules with it"
                )
            self._claimed = modules
            _ADAPTED.update(modules)

    def _intercept_sigint(self) -> None:
        # Python runs signal handlers in the main thread only: no other thread gets the exception.
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._next_handler = handler
                signal.signal(signal.SIGINT, self._on_sigint)

    def _release_sigint(self) -> None:
        if self._next_handler is None or signal.getsignal(signal.SIGINT) != self._on_sigint:
            return  # never taken, or the block has set a handler of its own and left it there
        signal.signal(signal.SIGINT, self._next_handler)
        self._send_held_back()

    def _send_held_back(self) -> None:
        if self._held_back:
            self._held_back = False
            signal.raise_signal(signal.SIGINT)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code in _SHIELDED + _INTERRUPTIBLE and at.f_locals["self"] is self:
                break
            at = at.f_back
        if at is None or at.f_code in _INTERRUPTIBLE:
            self._next_handler(signum, frame)
        else:
            self._held_back = True


class Snapshot:
    """What a query may change in a model. Restoring may be cut short and begun again."""

    def __init__(
        self,
        modules: list[nn.Module],
        parameters: list[nn.Parameter],
        buffers: list[Tensor],
        place: str,
        weights: Weights | None,
    ) -> None:
        # The slots too: code in the block may replace a buffer instead of writing to it.
        self._modules = [
            (module, module.training, dict(module._parameters), dict(module._buffers))
            for module in modules
        ]
        self._flags = [(p, p.requires_grad, p.grad) for p in parameters]
        # Tied parameters and shared buffers appear once. `data` keeps dtype, device and storage in
        # case the block moves or casts the model; only what training may write to is copied.
        self._tensors: list[tuple[Tensor, Tensor, tuple[Any, ...], Tensor | None]] = []
        self._weights = weights  # with copies of its own
        elsewhere = set() if weights is None else set(map(id, weights.parameters))
        for p, requires_grad, _ in self._flags:
            data = p.data
            copied = requires_grad and id(p) not in elsewhere
            self._tensors.append((p, data, _geometry(p), _copy(data, place) if copied else None))
        self._buffers = [(b, _written(b.data).clone()) for b in buffers]
        self._tensors += [(b, b.data, _geometry(b), copy) for b, copy in self._buffers]
        if weights is not None:
            weights.save()

    def restore_buffers(self) -> None:
        """After passes that were not to count."""
        for module, _, _, buffers in self._modules:
            _put_back(module._buffers, buffers)
        for buffer, copy in self._buffers:
            _written(buffer).copy_(copy)

    def forget_values(self) -> None:
        """From now on `restore` puts back flags and gradients, but no values."""
        self._tensors, self._buffers, self._weights = [], [], None

    def restore(self) -> None:
        failure: Exception | None = None
        for module, training, parameters, buffers in self._modules:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            if module.training != training:
                module.training = training
        for tensor, data, geometry, copy in self._tensors:
            try:
                if _geometry(tensor) != geometry:
                    tensor.data = data
                if copy is not None:
                    with torch.no_grad():
                        _written(tensor).copy_(copy)
            except Exception as error:  # the others are restored all the same
                failure = failure or error
        if self._weights is not None:
            try:
                self._weights.restore()
            except Exception as error:
                failure = failure or error
        for parameter, requires_grad, grad in self._flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        if failure is not None:
            raise failure


_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_LOCK = threading.Lock()
_INTERRUPTIBLE = tuple(f.__code__ for f in (Adaptation._intercept_sigint, Adaptation._run))
# Claiming too: an interrupt just as `with _LOCK` is left could keep it locked for ever.
_ENTRY_AND_EXIT = (
    Adaptation.__enter__,
    Adaptation._claim_model,
    Adaptation.__exit__,
    Adaptation.keep,
)
_SHIELDED = tuple(f.__code__ for f in _ENTRY_AND_EXIT)


def _put_back(slots: dict[str, Any], saved: dict[str, Any]) -> None:
    if (slots or saved) and [(k, id(v)) for k, v in slots.items()] != [
        (k, id(v)) for k, v in saved.items()
    ]:
        slots.clear()
        slots.update(saved)


def tensors_of(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters and buffers, tied and shared ones once: one walk for all that ask for them."""
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    buffers = {id(b): b for m in modules for b in m._buffers.values() if b is not None}
    return list(parameters.values()), list(buffers.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _copy(tensor: Tensor, place: str) -> Tensor:
    if place == "host" and tensor.device.type == "cuda":
        return pinned_like(tensor).copy_(tensor)
    return tensor.clone()


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _written(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded one, which cannot be written to."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor
