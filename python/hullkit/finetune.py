"""Test-time finetuning: a model adapted to one query in a with-block, its base weights after it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._adaptation import Adaptation
from ._checks import MAX_TOTAL, check_choice, check_int, check_number, check_tensor
from .metrics import (
    at_least_float32,
    check_module,
    check_token_ids,
    device_of,
    forward_parameters,
    logits_of,
    vocabulary_size,
)
from .optim import Adam, accumulate_
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
    moments and the bias correction as any other; nothing is cached or cloned for it: a burst is one
    fused pass over memory (:class:`hullkit.optim.Adam`, no weight decay, fresh for every query).

    Equivalent to, in eval mode: for each example, for each of its c updates: `if update % r == 0:
    recompute the gradient`, `optimizer.step()`. Written out in `hullkit.reference.finetune`.

    mode="accumulate" uses multiplicities the other way: one pass for each distinct example, and one
    Adam update with the mean gradient of the multiset, `sum_i counts_i g_i / sum_i counts_i`,
    summed in float32 (:func:`hullkit.optim.accumulate_`).

    The loss is the model's own `.loss` if its forward takes `labels` (Hugging Face; looked up once,
    here), else the mean next-token cross entropy, in float32, of the logits `model(input_ids)`.

    The model runs in eval mode, in the passes and in the with-block: no dropout (the published code
    leaves it on). Parameters with `requires_grad` are trained, whichever they are.

    Args:
        model: a `torch.nn.Module` on one device. Nothing is written to it here.
        lr, betas, eps: Adam's; lr >= 0, betas in [0, 1), eps >= 0.
        refresh_interval: r >= 1, updates per gradient; without meaning for "accumulate".
        mode: "reuse" or "accumulate".

    `last_report` is the AdaptReport of the latest query, None if it failed.

    Raises TypeError or ValueError at a bad argument, or if no parameter requires a gradient.

    Complexity, per query: sum_i ceil(counts_i / r) passes and sum(counts) updates; to accumulate,
    a pass for each positive count and one update. Memory: beside the passes' activations, a copy of
    the trained parameters and of all buffers (until the block ends), a gradient, its float32 sum if
    accumulating, and Adam's two moments (until the block begins).

    Source: HullFT, arXiv 2605.30337, gradient caching.
    """

    __test__ = False  # the name begins with Test; it is no test class

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-5,
        refresh_interval: int = 2,
        mode: str = "reuse",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_module(model)
        self.model = model
        self.lr = _finite("lr", lr)
        self.refresh_interval = check_int("refresh_interval", refresh_interval, 1)
        check_choice("mode", mode, ("reuse", "accumulate"))
        self.mode = mode
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
        # Accumulating, an example is one burst whatever its count.
        interval = self.refresh_interval if self.mode == "reuse" else MAX_TOTAL
        schedule = reuse_schedule(counts, interval)
        if len(examples) != len(counts):
            raise ValueError(f"examples: expected {len(counts)}, as counts, got {len(examples)}")
        vocabulary = vocabulary_size(self.model)
        inputs = [self._inputs(f"examples[{i}]", e, vocabulary) for i, e in enumerate(examples)]
        return Adaptation(self, inputs, schedule)

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
        optimizer = Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps)
        run = self._reuse if self.mode == "reuse" else self._accumulate
        try:
            return run(inputs, schedule, parameters, optimizer)
        finally:
            # A traceback keeps this frame; it must not keep the moments.
            optimizer.reset()

    def _reuse(
        self,
        inputs: list[dict[str, Tensor]],
        schedule: list[Reuse],
        parameters: list[nn.Parameter],
        optimizer: Adam,
    ) -> AdaptReport:
        losses = []
        for example, num_steps in schedule:
            losses.append(self._pass(inputs[example], example, parameters))
            optimizer.step(num_steps=num_steps)
            optimizer.zero_grad(set_to_none=True)
        return AdaptReport(sum(burst.num_steps for burst in schedule), len(schedule), tuple(losses))

    def _accumulate(
        self,
        inputs: list[dict[str, Tensor]],
        schedule: list[Reuse],
        parameters: list[nn.Parameter],
        optimizer: Adam,
    ) -> AdaptReport:
        total = sum(burst.num_steps for burst in schedule)
        sums: dict[Tensor, Tensor] = {}  # of the parameters that had a gradient
        losses = []
        for example, count in schedule:
            losses.append(self._pass(inputs[example], example, parameters))
            grads = {p: p.grad for p in parameters if p.grad is not None}
            for parameter in grads.keys() - sums.keys():
                sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            accumulate_([sums[p] for p in grads], list(grads.values()), count / total)
            del grads
            optimizer.zero_grad(set_to_none=True)
        optimizer.step_with(sums)
        return AdaptReport(1, len(schedule), tuple(losses))

    def _pass(
        self, inputs: dict[str, Tensor], example: int, parameters: list[nn.Parameter]
    ) -> float:
        """Forward and backward, gradients into .grad; the loss. Both must be finite."""
        loss = self._loss(inputs)
        loss.backward()
        value = loss.item()
        _check_finite(f"loss of examples[{example}]", value)
        # In the maximum norm: no square can overflow, and NaN wins.
        grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel() > 0]
        largest = torch.stack([torch.linalg.vector_norm(grad, math.inf) for grad in grads]).max()
        _check_finite(f"largest gradient entry of examples[{example}]", largest.item())
        return value

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
