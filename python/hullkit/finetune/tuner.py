"""Test-time finetuning: a model adapted to one query in a with-block, its base weights after it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import MAX_TOTAL, check_choice, check_int, check_number, check_tensor
from ..language_model.interface import (
    IGNORED,
    TokenLimits,
    check_labels,
    check_module,
    check_token_ids,
    check_trainable,
    forward_parameters,
    token_limits,
)
from ..language_model.loss import PRECISIONS
from .adaptation import Adaptation, is_adapted
from .query_run import ModelPasses, QueryRun, Settings, trained_parameters
from .report import AdaptReport
from .rounding import ROUNDINGS
from .schedule import reuse_schedule


class TestTimeFinetuner:
    """Finetune a causal language model on a query's selected examples, and take it back afterwards.

        tuner = TestTimeFinetuner(model)
        with tuner.adapted(examples, counts) as model:
            ...                                  # score or generate with the adapted model
        # base weights are back, bit for bit

    For each burst `(example, num_steps)` of `reuse_schedule(counts, refresh_interval)`: one forward
    and backward pass of the example alone (batch of one), then `num_steps` consecutive
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
    leaves it on). Gradient checkpointing of transformers' layers works all the same, but under
    `compile`; a model that cannot do it in eval mode gets a warning. Parameters with
    `requires_grad` are trained, whichever they are: all weights, some layers, adapters (LoRA).

    What models of transformers write out in many kernels runs in one each while a pass lasts:
    GPT-2's gelu and, on CUDA, the norms of Llama, Mistral and Qwen and the loss. Where nobody else
    sees the logits (these models themselves or in PEFT, no hooks), the last layer goes with the
    loss, a chunk of the logits at a time, and a tied embedding adds to its gradient in place; else
    the gradient takes the place of the logits. The same functions, rounded otherwise. Not where
    `compile` fuses, nor what somebody else has replaced (a module's `forward`, the model's
    `loss_function`). `last_report.fused` names what passes replaced, `fuse=False` replaces nothing.
    Captured passes compute gelu and silu again instead of keeping the result.

    On a CUDA device passes and their updates are recorded as CUDA graphs, at the first example of a
    length or by :meth:`warmup`, and replayed: launches cost the host next to nothing, and updates
    run beside the backward pass. A sequence is padded to one of 8 lengths for every doubling (32
    tokens apart up to 512), with a tail that is not scored; a causal model's loss and gradients do
    not see it. Whether that is so is checked once, and if not, every length gets its own graph.
    At most 32 graphs are kept, in one pool of memory. They hold while parameters and buffers lie
    where they lay; a model that was moved, cast or changed is recorded again. One that cannot be
    recorded (host decisions on values, say) runs eagerly: with a warning, and the reason in
    `last_report`. So does mode="accumulate".

    Args:
        model: a `torch.nn.Module` on one device. Nothing is written to it here.
        lr, betas, eps: Adam's; lr >= 0, betas in [0, 1), eps >= 0.
        refresh_interval: r >= 1, updates per gradient; without meaning for "accumulate".
        mode: "reuse" or "accumulate".
        precision: of the passes: "float32" is the model's own dtype with full products (whatever
            torch's setting outside), "tf32" rounds the inputs of float32 products to 11 bits (CUDA
            only), "bf16" is autocast. Updates are in the parameters' dtype always.
        capture: None as above; True to raise where passes cannot be captured; False for eager ones.
        compile: whether passes go through `torch.compile`: fewer, larger kernels, for a minute or
            so the first time and again when lengths first differ.
        rounding: of half-precision parameters and their moments after a burst: "stochastic", up or
            down at random in proportion, or "nearest", which loses most of what small steps do.
        fuse: whether passes may replace a model's methods and functions as described above. With
            False the model's own run, its loss and last layer too; gradient checkpointing stays on.
        seed: of that noise, a function of seed, parameter's name, update and element: the same
            bits in every run, whatever else is trained.
        snapshot: "device" keeps base weights beside the parameters, "host" in pinned memory of the
            host: the device's memory for the time of the copies.

    Half-precision parameters have their moments in bfloat16. Passes of a float16 model read
    bfloat16 copies of its tensors (float16's range ends where many gradients are, below 6e-8, and
    activations beyond 65504), and passes of PEFT's float32 adapters on a half-precision base copies
    of the adapters; updates are made to the tensors themselves. Captured bf16 passes of a float32
    model read copies of its linear layers' weights, which the updates write: nothing is cast.

    `last_report` is the AdaptReport of the latest query, None if it failed.

    Raises TypeError or ValueError at a bad argument, if no parameter requires a gradient, or if one
    is on the meta device (offloaded), was made in inference mode, or is a sparse embedding's. A
    tuner can be copied and pickled with its model, except while it adapts; graphs are made anew.

    Complexity, per query: sum_i ceil(counts_i / r) passes and sum(counts) updates; to accumulate,
    a pass for each positive count and one update. Memory: beside the passes' activations, a copy of
    the trained parameters and of all buffers (until the block ends), a gradient, its float32 sum if
    accumulating, and Adam's two moments (until the block begins). Where passes are captured, all of
    these but the buffers' copy stay until :meth:`release`.

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
        precision: str = "float32",
        capture: bool | None = None,
        compile: bool = False,
        snapshot: str = "device",
        rounding: str = "stochastic",
        seed: int = 0,
        fuse: bool = True,
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
        check_choice("precision", precision, PRECISIONS)
        check_choice("snapshot", snapshot, ("device", "host"))
        check_choice("rounding", rounding, ROUNDINGS)
        check_choice("capture", capture, (None, True, False))
        check_choice("compile", compile, (True, False))
        check_choice("fuse", fuse, (True, False))
        self.precision = precision
        self.capture = capture
        self.compile = compile
        self.fuse = fuse
        self.snapshot = snapshot
        self.rounding = rounding
        self.seed = check_int("seed", seed, 0, (1 << 63) - 1)
        if capture and mode == "accumulate":
            raise ValueError("capture: expected None or False for mode='accumulate', got True")
        self.last_report: AdaptReport | None = None
        check_trainable(model)
        trained_parameters(model.parameters())
        self._set_up()

    def _set_up(self) -> None:
        """Makes what depends on the arguments alone, and is not copied or pickled."""
        self._passes = ModelPasses(self.model, self._settings())
        self._forward = forward_parameters(self.model)
        self._open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._forward.values())

    def __getstate__(self) -> dict[str, Any]:
        if any(is_adapted(module) for module in self.model.modules()):
            raise RuntimeError(
                "copying or pickling a tuner: expected a model that is not being adapted, got one "
                "inside an adapted() block"
            )
        made = ("_passes", "_forward", "_open")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def _settings(self) -> Settings:
        """The attributes as they are now: a user may set them between two queries."""
        return Settings(**{name: getattr(self, name) for name in Settings._fields})

    def adapted(
        self, examples: Any, counts: Any, *, select_seconds: float | None = None
    ) -> Adaptation:
        """A with-block in which the model is finetuned on `examples`; it yields the model.

        Everything is checked by this call, before any weight is touched; finetuning happens on
        entry. Inside the block the parameters' `.grad` is None. When the block is left, or entering
        it fails, whatever the reason (an exception, out of memory, a signal's handler that raises
        at any moment): trained parameters and buffers have their former bits, and `.grad` objects,
        `requires_grad` and training flags are as before. Signals that arrive during the restoring
        are handled once it is finished.

        So is what modules keep beside: their submodules and attributes are the former objects, new
        attributes are gone, tensors among them have their former values, and Python's containers
        (lists, dicts, sets, deques, nested) their former content. Not undone: hooks, and
        `Module.compile`; what other objects keep (a config, a cache object, a module that is not
        registered); what is no attribute (globals, closures). Parameters that do not require a
        gradient are not copied: do not write to them in the block.

        Args:
            examples: a sequence with one entry per unique example, visited in this order: int64
                token ids (T,) or (1, T), T >= 2, which are their own labels; or a dict of tensors,
                the model's keyword inputs: `input_ids` as above, `labels` (default: input_ids; -100
                is not scored) and others; one-dimensional ones get the batch dimension.
            counts: (n,) integers >= 0, updates for each example; 0 skips it. See `reuse_schedule`.
            select_seconds: what choosing them took, for the report alone.

        Raises:
            TypeError, ValueError: a bad example or count, named.
            RuntimeError: on entry, if the model or a part of it is being adapted already.
            FloatingPointError: on entry: a loss or gradient is not finite; names the example.
            torch.OutOfMemoryError: on entry, in a pass, its capture or an update.
        """
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            raise TypeError(f"examples: expected a list of examples, got {type(examples).__name__}")
        # Accumulating, an example is one burst whatever its count.
        interval = self.refresh_interval if self.mode == "reuse" else MAX_TOTAL
        schedule = reuse_schedule(counts, interval)
        if len(examples) != len(counts):
            raise ValueError(f"examples: expected {len(counts)}, as counts, got {len(examples)}")
        check_trainable(self.model)
        limits = token_limits(self.model)
        inputs = [self._inputs(f"examples[{i}]", e, limits) for i, e in enumerate(examples)]
        if select_seconds is not None:
            select_seconds = check_number("select_seconds", select_seconds, 0.0)
        run = QueryRun(self._passes, self._settings(), inputs, schedule, select_seconds)
        return Adaptation(self.model, run, self)

    def adapt_(
        self, examples: Any, counts: Any, *, select_seconds: float | None = None
    ) -> AdaptReport:
        """Finetune the model in place, for code that puts weights back itself.

        As entering :meth:`adapted` and never leaving it, but for gradients and flags, which are as
        before; so are weights and buffers if it fails. The next query starts with fresh moments.
        """
        self.adapted(examples, counts, select_seconds=select_seconds).keep()
        assert self.last_report is not None
        return self.last_report

    def _inputs(self, name: str, example: Any, limits: TokenLimits) -> dict[str, Tensor]:
        """The checked keyword inputs of one example, `input_ids` and `labels` among them."""
        if not isinstance(example, Mapping):
            ids = check_token_ids(name, example, limits)
            check_labels(name, ids[:, 1:], limits)
            return {"input_ids": ids, "labels": ids}
        if "input_ids" not in example:
            raise ValueError(f"{name}: expected the key 'input_ids', got {list(example)}")
        inputs: dict[str, Tensor] = {}
        for key, value in example.items():
            if key not in ("input_ids", "labels", *self._forward) and not self._open:
                raise ValueError(f"{name}: expected inputs of the model's forward, got {key!r}")
            tensor = check_tensor(f"{name}[{key!r}]", value)
            inputs[key] = tensor[None] if tensor.ndim == 1 else tensor
        ids = check_token_ids(f"{name}['input_ids']", inputs["input_ids"], limits)
        labels = inputs.setdefault("labels", ids)
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}['labels']: expected dtype torch.int64, got {labels.dtype}")
        if labels.shape != ids.shape:
            expected, got = tuple(ids.shape), tuple(labels.shape)
            raise ValueError(f"{name}['labels']: expected shape {expected}, got {got}")
        scored = labels[:, 1:] != IGNORED
        if not scored.any():
            raise ValueError(f"{name}['labels']: expected a scored token, got only {IGNORED}")
        check_labels(f"{name}['labels']", labels.where(labels != IGNORED, 0), limits)
        return inputs

    def warmup(self, lengths: Iterable[int]) -> None:
        """Record, or compile, the passes of examples of these lengths in tokens, ahead of the first
        query that has them. The model is as before afterwards.

        Raises as `adapted` and its block do.
        """
        check_trainable(self.model)
        limits = token_limits(self.model)
        sizes = [check_int("lengths", n, 2) for n in lengths]
        ids = [torch.zeros(size, dtype=torch.int64, device="cpu") for size in sizes]
        inputs = [self._inputs(f"lengths[{i}]", x, limits) for i, x in enumerate(ids)]
        with Adaptation(self.model, QueryRun(self._passes, self._settings(), inputs, []), self):
            pass

    def release(self) -> None:
        """Give back what is kept from query to query: graphs, moments, the copy of the weights.

        The next query makes them anew, and tries again to capture what could not be captured.
        """
        self._passes.release()


def _finite(name: str, value: Any, below: float = math.inf) -> float:
    number = check_number(name, value, 0.0)
    if number >= below:
        raise ValueError(f"{name}: expected a number below {below}, got {number}")
    return number
