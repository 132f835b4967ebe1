"""Test-time finetuning: a model adapted to one query in a with-block, its base weights after it."""

from __future__ import annotations

import inspect
import math
import signal
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_int, check_number, check_tensor
from .metrics import (
    at_least_float32,
    check_module,
    check_token_ids,
    device_of,
    forward_parameters,
    logits_of,
    vocabulary_size,
)
from .schedule import Reuse, reuse_schedule

__all__ = ["AdaptReport", "TestTimeFinetuner"]

IGNORED = -100  # the label of a token that is not scored, as in F.cross_entropy


class AdaptReport(NamedTuple):
    """What one query took: updates, passes, and the loss (usually nats per token) of each pass."""

    num_updates: int
    num_passes: int
    losses: tuple[float, ...]


class TestTimeFinetuner:
    """Finetune a causal language model on a query's selected examples, and take it back afterwards.

        tuner = TestTimeFinetuner(model)
        with tuner.adapted(examples, counts) as model:
            ...                                  # score or generate with the adapted model
        # base weights are back, bit for bit

    For each burst `(example, num_steps)` of `reuse_schedule(counts, refresh_interval)`: one forward
    and backward pass of the example alone (batch of one, no padding), then `num_steps` consecutive
    Adam updates with that gradient. An update with a reused gradient advances the step counter, the
    moments and the bias correction as any other; nothing is cached or cloned for it. Adam is Kingma
    & Ba's (arXiv 1412.6980) without weight decay, its state fresh for every query.

    Equivalent to, in eval mode: for each example, for each of its c updates: `if update % r == 0:
    recompute the gradient`, `optimizer.step()`. Written out in `hullkit.reference.finetune`.

    The loss is the model's own `.loss` if its forward takes `labels` (Hugging Face; looked up once,
    here), else the mean next-token cross entropy, in float32, of the logits `model(input_ids)`.

    The model runs in eval mode, in the passes and in the with-block: no dropout (the published code
    leaves it on). Parameters with `requires_grad` are trained, whichever they are.

    Args:
        model: a `torch.nn.Module` on one device. Nothing is written to it here.
        lr, betas, eps: Adam's; lr >= 0, betas in [0, 1), eps >= 0.
        refresh_interval: r >= 1, updates per gradient.

    `last_report` is the AdaptReport of the latest query, None if it failed.

    Raises TypeError or ValueError at a bad argument, or if no parameter requires a gradient.

    Complexity, per query: sum_i ceil(counts_i / r) passes and sum(counts) updates. Memory: beside
    the passes' activations, a copy of the trained parameters and of all buffers (until the block
    ends), a gradient and Adam's two moments (until the block begins).

    Source: HullFT, arXiv 2605.30337, gradient caching.
    """

    __test__ = False  # the name begins with Test; it is no test class

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-5,
        refresh_interval: int = 2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_module(model)
        self.model = model
        self.lr = _finite("lr", lr)
        self.refresh_interval = check_int("refresh_interval", refresh_interval, 1)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected a pair of numbers, got {betas!r}")
        first, second = (_finite(f"betas[{i}]", beta, below=1.0) for i, beta in enumerate(betas))
        self.betas = (first, second)
        self.eps = _finite("eps", eps)
        self.last_report: AdaptReport | None = None
        _check_trainable(model)
        self._forward = forward_parameters(model)
        self._open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._forward.values())

    def adapted(self, examples: Any, counts: Any) -> AbstractContextManager[nn.Module]:
        """A with-block in which the model is finetuned on `examples`; it yields the model.

        Everything is checked by this call, before any weight is touched; finetuning happens on
        entry. Inside the block the parameters' `.grad` is None. When the block is left, or entering
        it fails, whatever the reason (an exception, out of memory, Ctrl-C at any moment): trained
        parameters and buffers have their former bits, and `.grad` objects, `requires_grad` and
        training flags are as before. A Ctrl-C during the restoring is raised once it is finished.
        Parameters that do not require a gradient are not copied: do not write to them in the block.

        Args:
            examples: a sequence with one entry per unique example, visited in this order: int64
                token ids (T,) or (1, T), T >= 2, which are their own labels; or a dict of tensors,
                the model's keyword inputs: `input_ids` as above, `labels` (default: input_ids; -100
                is not scored) and others; one-dimensional ones get the batch dimension.
            counts: (n,) integers >= 0, updates for each example; 0 skips it. See `reuse_schedule`.

        Raises:
            TypeError, ValueError: a bad example or count, named.
            RuntimeError: on entry, if the model or a part of it is being adapted already.
            FloatingPointError: on entry: a loss or gradient is not finite; names the example.
        """
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            raise TypeError(f"examples: expected a list of examples, got {type(examples).__name__}")
        schedule = reuse_schedule(counts, self.refresh_interval)
        if len(examples) != len(counts):
            raise ValueError(f"examples: expected {len(counts)}, as counts, got {len(examples)}")
        vocabulary = vocabulary_size(self.model)
        inputs = [self._inputs(f"examples[{i}]", e, vocabulary) for i, e in enumerate(examples)]
        return _Adaptation(self, inputs, schedule)

    def _inputs(self, name: str, example: Any, vocabulary: int | None) -> dict[str, Tensor]:
        """The checked keyword inputs of one example, `input_ids` and `labels` among them."""
        if not isinstance(example, Mapping):
            ids = check_token_ids(name, example, vocabulary)
            return {"input_ids": ids, "labels": ids}
        if "input_ids" not in example:
            raise ValueError(f"{name}: expected the key 'input_ids', got {list(example)}")
        inputs: dict[str, Tensor] = {}
        for key, value in example.items():
            if key not in ("input_ids", "labels", *self._forward) and not self._open:
                raise ValueError(f"{name}: expected inputs of the model's forward, got {key!r}")
            tensor = check_tensor(f"{name}[{key!r}]", value)
            inputs[key] = tensor[None] if tensor.ndim == 1 else tensor
        ids = check_token_ids(f"{name}['input_ids']", inputs["input_ids"], vocabulary)
        labels = inputs.setdefault("labels", ids)
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}['labels']: expected dtype torch.int64, got {labels.dtype}")
        if labels.shape != ids.shape:
            expected, got = tuple(ids.shape), tuple(labels.shape)
            raise ValueError(f"{name}['labels']: expected shape {expected}, got {got}")
        scored = labels[:, 1:] != IGNORED
        if not scored.any():
            raise ValueError(f"{name}['labels']: expected a scored token, got only {IGNORED}")
        # Labels are indices into the logits: out of range they end a CUDA process, as ids do.
        check_token_ids(f"{name}['labels']", labels.where(labels != IGNORED, 0), vocabulary)
        return inputs

    def _run(self, inputs: list[dict[str, Tensor]], schedule: list[Reuse]) -> AdaptReport:
        """Finetune the model in place. Gradients are None before and after."""
        parameters = _check_trainable(self.model)
        optimizer = torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps)
        losses = []
        try:
            for example, num_steps in schedule:
                loss = self._loss(inputs[example])
                loss.backward()
                losses.append(loss.item())
                _check_finite(f"loss of examples[{example}]", losses[-1])
                # In the maximum norm: no square can overflow, and NaN wins.
                grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel() > 0]
                norms = [torch.linalg.vector_norm(grad, math.inf) for grad in grads]
                largest = torch.stack(norms).max().item()
                _check_finite(f"largest gradient entry of examples[{example}]", largest)
                for _ in range(num_steps):
                    optimizer.step()
                del loss, grads
                optimizer.zero_grad(set_to_none=True)
        finally:
            # A traceback keeps this frame; it must not keep the moments.
            optimizer.state.clear()
        return AdaptReport(sum(burst.num_steps for burst in schedule), len(schedule), tuple(losses))

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        device = device_of(self.model, inputs["input_ids"])
        moved: dict[str, Any] = {}
        for key, tensor in inputs.items():  # autograd takes only a copy of an inference tensor
            moved[key] = (tensor.clone() if tensor.is_inference() else tensor).to(device)
        if "use_cache" in self._forward:
            moved.setdefault("use_cache", False)  # keys and values kept for generation
        if "labels" in self._forward:
            loss = getattr(self.model(**moved), "loss", None)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                got = type(loss).__name__
                raise TypeError(f"model output: expected .loss, a scalar tensor, got {got}")
            return loss
        ids, labels = moved.pop("input_ids"), moved.pop("labels")
        logits = logits_of(self.model(ids, **moved), ids)[0, :-1]  # [T - 1, V]
        return F.cross_entropy(at_least_float32(logits), labels[0, 1:], ignore_index=IGNORED)


class _Adaptation:
    """One with-block of `TestTimeFinetuner.adapted`.

    A class and not a generator: a Ctrl-C may arrive between a generator's yield and the block, or
    as `__exit__` is called, before its first line, where no try can catch it. So from entry to exit
    SIGINT comes here first: in the block and in the passes it is handed on at once, elsewhere in
    this class it is held back, and sent again when the model is restored.
    """

    def __init__(
        self, tuner: TestTimeFinetuner, inputs: list[dict[str, Tensor]], schedule: list[Reuse]
    ) -> None:
        self._tuner = tuner
        self._inputs = inputs
        self._schedule = schedule
        self._entered = False
        self._claimed: list[nn.Module] = []
        self._snapshot: _Snapshot | None = None
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

    def _run(self) -> None:
        tuner, model = self._tuner, self._tuner.model
        self._claim_model()
        self._send_held_back()
        tuner.last_report = None
        with torch.inference_mode(False), torch.enable_grad():
            self._snapshot = _Snapshot(model)  # nothing is written before it is complete
            for module in model.modules():
                # The flag itself, not .eval(): that may be overridden to do more (merge adapters).
                module.training = False
            for parameter in model.parameters():
                parameter.grad = None
            tuner.last_report = tuner._run(self._inputs, self._schedule)

    def _finish(self) -> None:
        """Undo all of __enter__, as far as it got."""
        error: BaseException | None = None
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
        self._release_sigint()
        if error is not None:
            raise error

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


class _Snapshot:
    """What a query may change in a model. Restoring may be cut short and begun again."""

    def __init__(self, model: nn.Module) -> None:
        # The slots too: code in the block may replace a buffer instead of writing to it.
        self._modules = [
            (module, module.training, dict(module._parameters), dict(module._buffers))
            for module in model.modules()
        ]
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        # Tied parameters and shared buffers appear once. `data` keeps dtype, device and storage in
        # case the block moves or casts the model; only what training may write to is copied.
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for p in model.parameters():
            self._tensors.append((p, p.data, p.data.clone() if p.requires_grad else None))
        for buffer in model.buffers():
            self._tensors.append((buffer, buffer.data, _written(buffer.data).clone()))

    def restore(self) -> None:
        failure: Exception | None = None
        for module, training, parameters, buffers in self._modules:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            module.training = training
        for tensor, data, copy in self._tensors:
            try:
                if _geometry(tensor) != _geometry(data):
                    tensor.data = data
                if copy is not None:
                    with torch.no_grad():
                        _written(tensor).copy_(copy)
            except Exception as error:  # the others are restored all the same
                failure = failure or error
        for parameter, requires_grad, grad in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        if failure is not None:
            raise failure


_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_LOCK = threading.Lock()
_INTERRUPTIBLE = tuple(f.__code__ for f in (_Adaptation._intercept_sigint, _Adaptation._run))
# Claiming too: an interrupt just as `with _LOCK` is left could keep it locked for ever.
_ENTRY_AND_EXIT = (_Adaptation.__enter__, _Adaptation._claim_model, _Adaptation.__exit__)
_SHIELDED = tuple(f.__code__ for f in _ENTRY_AND_EXIT)


def _put_back(slots: dict[str, Any], saved: dict[str, Any]) -> None:
    # Compared by identity: tensors compare by element.
    if [(k, id(v)) for k, v in slots.items()] != [(k, id(v)) for k, v in saved.items()]:
        slots.clear()
        slots.update(saved)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _written(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded one, which cannot be written to."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def _check_trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected a parameter with requires_grad, got none")
    return parameters


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: expected a finite number, got {value}")


def _finite(name: str, value: Any, below: float = math.inf) -> float:
    number = check_number(name, value, 0.0)
    if number >= below:
        raise ValueError(f"{name}: expected a number below {below}, got {number}")
    return number
