# SPDX-License-Identifier: Apache-2.0
"""Test-time finetuning: a model adapted to one query in a with-block, and restored after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import MAX_TOTAL, check_int, check_number, check_tensor
from ..language_model.interface import (
    IGNORED,
    TokenLimits,
    check_labels,
    check_module,
    check_one_process,
    check_predicted,
    check_token_ids,
    check_trainable,
    forward_parameters,
    is_compiled,
    token_limits,
)
from ..language_model.own_loss import check_own_labels
from ..optim._record import MAX_NUM_STEPS
from .adaptation import Adaptation, is_adapted
from .query_run import ModelPasses, QueryRun, check_trained, trained_parameters
from .report import AdaptReport
from .schedule import reuse_schedule
from .settings import Settings


class TestTimeFinetuner:
    """Finetunes a causal language model for one prompt in a with-block, and takes it back.

    `reuse_schedule(counts, refresh_interval)` gives bursts `(example, k)`. A burst is one forward
    and backward pass of the example alone, then k Adam updates with its gradient g:

        t = t + 1;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    m, v and t are 0 at the beginning of every query. There is no weight decay. The k updates of a
    burst are one pass over memory (:class:`hullkit.optim.Adam`).

    mode="accumulate" makes one pass for each distinct example and one single update. Its gradient
    is the mean over the multiset, `sum_i counts_i g_i / sum_i counts_i`, summed in float32.

    The loss is the model's own `.loss` if its forward takes `labels`, as in transformers. Otherwise
    it is the mean next-token cross entropy, in float32, of the logits `model(input_ids)`; also if
    the model's own scores labels in their places, as that of Bart's decoder does.

    The model runs in eval mode, so there is no dropout; the published code leaves it on. Gradient
    checkpointing of transformers works in eval mode too, but not with `compile`.

    Equivalent to, in eval mode: for each example, for each of its c updates: `if update % r == 0:
    recompute the gradient`, `optimizer.step()`. `hullkit.reference.finetune` writes it out.

    The arguments are attributes. All but `model` may be set between two queries: the next one
    checks and follows them, and records its graphs anew where they were made for others.

    Args:
        model: a `torch.nn.Module` on one device. The parameters with `requires_grad` are trained:
            all weights, some layers, or adapters (LoRA). The constructor writes nothing to it.
        lr, betas, eps: Adam's; lr >= 0, betas in [0, 1), eps >= 0.
        refresh_interval: r >= 1, the most updates with one gradient. "accumulate" ignores it.
        mode: "reuse" or "accumulate".
        precision: of the passes. "float32" is the model's own dtype with full products, whatever
            torch's setting is. "tf32" rounds the inputs of float32 products to 11 bits (CUDA only).
            "bf16" is autocast. Updates are made in the parameters' dtype.
        capture: whether passes are recorded as CUDA graphs. None: where that is possible, else
            eager passes with a warning. True: an error where it is not possible. False: never.
        compile: whether passes go through `torch.compile`.
        rounding: how half-precision parameters and moments are rounded after a burst. "stochastic":
            up or down at random in proportion. "nearest": most of a small step is lost.
        seed: seed of that noise, a hash of seed, parameter name, update and element.
        snapshot: "device" keeps base weights on the device, "host" in pinned memory of the host.
        fuse: whether a pass may run faster functions in place of the model's own: linear layers,
            norms, gates, attention, the loss. They compute the same, rounded otherwise. With False
            nothing is replaced; gradient checkpointing stays on. `last_report.fused` names what was
            replaced. What others have replaced is left alone, and so is all on a CPU, with
            `compile`, and in a model of which a part is compiled.
        activations: "keep" holds the tensors that the backward pass needs. "recompute" holds one
            input for each layer, for long texts; a layer then runs twice. Layers are the members of
            every `nn.ModuleList` of modules of one class. "auto" keeps them while they fit into
            the free memory of a CUDA device, and recomputes those of longer texts. With `compile`
            or a compiled model the compiler decides.

    Attributes:
        last_report: the AdaptReport of the latest query; None if it failed.

    Raises:
        TypeError, ValueError: a bad argument; an encoder-decoder, or a model that classifies texts;
            no parameter with `requires_grad`; a parameter on the meta device (offloaded), made in
            inference mode, or of a sparse embedding.

    >>> import hullkit, torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> tuner = hullkit.TestTimeFinetuner(model, lr=0.1, refresh_interval=2)
    >>> with tuner.adapted([torch.tensor([1, 2, 3])], [5]) as model: report = tuner.last_report
    >>> report.num_updates, report.num_passes, report.path
    (5, 3, 'eager')

    Numerics: half-precision parameters have bfloat16 moments; passes of float16 models read
    bfloat16 copies of the weights.
    Cost: sum_i ceil(counts_i / r) passes and sum(counts) updates. Memory: activations, and a
    gradient, a copy and two moments of what is trained; graphs keep them until :meth:`release`.

    A tuner can be copied and pickled with its model, except while it adapts; graphs are made anew.

    Source: HullFT, arXiv 2605.30337, gradient caching.
    """

    __test__ = False  # pytest would take a class of this name for tests

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
        activations: str = "auto",
    ) -> None:
        check_module(model)
        check_one_process(model)
        self._model = model
        self.lr = lr
        self.refresh_interval = refresh_interval
        self.mode = mode
        self.betas = betas
        self.eps = eps
        self.precision = precision
        self.capture = capture
        self.compile = compile
        self.snapshot = snapshot
        self.rounding = rounding
        self.seed = seed
        self.fuse = fuse
        self.activations = activations
        self._settings()
        self.last_report: AdaptReport | None = None
        check_trainable(model)
        trained_parameters(model.parameters())
        self._set_up()

    def _set_up(self) -> None:
        """Makes what depends on the arguments alone, and is not copied or pickled."""
        self._passes = ModelPasses(self.model, self._settings())

    def __getstate__(self) -> dict[str, Any]:
        if any(is_adapted(module) for module in self.model.modules()):
            raise RuntimeError(
                "copying or pickling a tuner: expected a model that is not being adapted, got one "
                "inside an adapted() block"
            )
        return {name: value for name, value in self.__dict__.items() if name != "_passes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    @property
    def model(self) -> nn.Module:
        """The model that is adapted. Another one needs a tuner of its own."""
        return self._model

    def _settings(self) -> Settings:
        """The attributes as they are now, checked: a user may set them between two queries."""
        own = Settings(**{name: getattr(self, name) for name in Settings._fields}).checked()
        if own.activations == "recompute" and is_compiled(self.model):
            raise ValueError(
                "activations: expected 'auto' or 'keep' for a compiled model, got 'recompute'"
            )
        return own

    def adapted(
        self, examples: Any, counts: Any, *, select_seconds: float | None = None
    ) -> Adaptation:
        """A with-block in which the model is finetuned on `examples`; it yields the model.

        This call checks everything, copies the examples' tensors and touches no weight. Finetuning
        happens on entry. Inside the block the parameters' `.grad` is None.

        After the block, trained parameters and buffers have their former bits. `.grad` objects,
        `requires_grad`, training flags and the modules' attributes are as before. Tensors and
        Python's containers among the attributes have their former content. That holds after any
        exception, also on entry and from a signal's handler. A signal that arrives during the
        restoring is handled once it is finished.

        Not undone: hooks; `Module.compile`; what objects other than modules keep (a cache; a config
        where no parameter, module or memory was replaced); globals and closures. Parameters without
        `requires_grad` are not copied: a write to one is an error, but the write stays. Writes to
        its `.data` are not seen. PEFT's layers refuse to merge adapters in the block; a copy of the
        model may.

        Args:
            examples: a sequence with one entry per unique example, visited in this order. An entry
                is int64 token ids (T,) or (1, T), T >= 2, which are their own labels; or a dict of
                the model's keyword inputs: `input_ids` as above, `labels` (-100 is not scored;
                default: input_ids, but for those with 0 in a mask of one number a token) and
                others. One-dimensional inputs get the batch dimension.
            counts: (n,) integers >= 0, updates for each example; 0 skips it.
            select_seconds: the time that choosing them took, for the report alone.

        Returns:
            The with-block. It can be entered once. If you call its `__enter__` yourself, keep it
            for its `__exit__`: it alone has the base weights.

        Raises:
            TypeError, ValueError: a bad example or count, named.
            ValueError: on entry: a loss that depends on nothing trained; an input, of positions
                say, that leads outside of a table (values new to the tuner cost a forward pass).
            RuntimeError: on entry: the model or a part of it is being adapted already. On entry or
                after the block: a parameter without `requires_grad` was written to.
            FloatingPointError: on entry: a loss or gradient is not finite; names the example.
            torch.OutOfMemoryError: on entry, in a pass, its capture or an update.

        >>> import hullkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> base = model[0].weight.clone()
        >>> block = hullkit.TestTimeFinetuner(model).adapted([torch.tensor([1, 2, 3])], [1])
        >>> with block as adapted: print(torch.equal(adapted[0].weight, base))
        False
        >>> torch.equal(model[0].weight, base)
        True
        """
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            raise TypeError(f"examples: expected a list of examples, got {type(examples).__name__}")
        settings = self._settings()
        # mode="accumulate" makes one burst of an example, whatever its count.
        interval = settings.refresh_interval if settings.mode == "reuse" else MAX_TOTAL
        schedule = reuse_schedule(counts, interval)
        for example, num_steps in schedule if settings.mode == "reuse" else ():
            check_int(
                f"updates of examples[{example}] with one gradient", num_steps, 1, MAX_NUM_STEPS
            )
        if len(examples) != len(counts):
            raise ValueError(f"examples: expected {len(counts)}, as counts, got {len(examples)}")
        check_trainable(self.model)
        check_trained(self.model)
        limits = token_limits(self.model)
        inputs = [self._inputs(f"examples[{i}]", e, limits) for i, e in enumerate(examples)]
        if select_seconds is not None:
            select_seconds = check_number("select_seconds", select_seconds, 0.0)
        run = QueryRun(self._passes, settings, inputs, schedule, select_seconds)
        return Adaptation(self.model, run, self)

    def adapt_(
        self, examples: Any, counts: Any, *, select_seconds: float | None = None
    ) -> AdaptReport:
        """Finetunes the model in place, for code that restores weights itself.

        Weights and buffers stay as the query left them, but for float16 buffers of a float16 model:
        its passes write to copies in bfloat16. `.grad` and flags are as before. If it
        fails, weights and buffers are as before too. The next query starts with fresh moments.

        Args, Raises: as :meth:`adapted`, with all errors raised by this call.

        Returns:
            The report, also in `last_report`.

        >>> import hullkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> hullkit.TestTimeFinetuner(model).adapt_([torch.tensor([1, 2, 3])], [3]).num_passes
        2
        """
        self.adapted(examples, counts, select_seconds=select_seconds).keep()
        assert self.last_report is not None
        return self.last_report

    def _inputs(self, name: str, example: Any, limits: TokenLimits) -> dict[str, Tensor]:
        """The checked keyword inputs of one example, `input_ids` and `labels` among them.

        They are copies: a caller may fill his tensors anew before the passes read them.
        """
        if not isinstance(example, Mapping):
            ids = check_token_ids(name, example, limits).clone()
            check_predicted(name, ids, limits)
            return {"input_ids": ids, "labels": ids}
        if "input_ids" not in example:
            raise ValueError(f"{name}: expected the key 'input_ids', got {list(example)}")
        inputs: dict[str, Tensor] = {}
        forward = forward_parameters(self.model)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward.values())
        for key, value in example.items():
            if key not in ("input_ids", "labels", *forward) and not takes_any:
                raise ValueError(f"{name}: expected inputs of the model's forward, got {key!r}")
            tensor = check_tensor(f"{name}[{key!r}]", value)
            if tensor.is_meta:
                what = "expected a tensor with values, got one on the meta device"
                raise ValueError(f"{name}[{key!r}]: {what}")
            inputs[key] = (tensor[None] if tensor.ndim == 1 else tensor).clone()
        ids = check_token_ids(f"{name}['input_ids']", inputs["input_ids"], limits)
        labels = inputs.setdefault("labels", _labels(name, ids, inputs.get("attention_mask")))
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}['labels']: expected dtype torch.int64, got {labels.dtype}")
        if labels.shape != ids.shape:
            expected, got = tuple(ids.shape), tuple(labels.shape)
            raise ValueError(f"{name}['labels']: expected shape {expected}, got {got}")
        scored = labels[:, 1:] != IGNORED
        if not scored.any():
            raise ValueError(f"{name}['labels']: expected a scored token, got only {IGNORED}")
        check_labels(f"{name}['labels']", labels.where(labels != IGNORED, 0), limits)
        if self._passes.loss.in_place:
            check_own_labels(f"{name}['labels']", labels, ids)
        return inputs

    def warmup(self, lengths: Iterable[int]) -> None:
        """Records, or compiles, the passes of examples of these lengths ahead of the first query.

        A CUDA graph is recorded at the first example of a length: this does it in advance. The
        model is as before afterwards. Without capture or `compile` there is nothing to do.

        Sequences are padded to one of 8 lengths for every doubling, 32 tokens apart up to 512, with
        a tail that is not scored. The loss of a causal model does not see the tail; that is checked
        once, and if it does, every length has its own graph. At most 32 graphs are kept.

        A model is recorded again once its tensors were moved, cast or replaced, or others of them
        are trained. A graph does not see what else changes, such as a flag that the forward reads:
        call :meth:`release` after such a change.

        Args:
            lengths: numbers of tokens, each >= 2.

        Raises:
            What :meth:`adapted` and entering its block raise.

        >>> import hullkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> hullkit.TestTimeFinetuner(model).warmup([128, 256])
        """
        check_trainable(self.model)
        check_trained(self.model)
        limits = token_limits(self.model)
        if not isinstance(lengths, Iterable):
            raise TypeError(f"lengths: expected integers, got {type(lengths).__name__}")
        sizes = [check_int("lengths", n, 2) for n in lengths]
        ids = [torch.zeros(size, dtype=torch.int64, device="cpu") for size in sizes]
        inputs = [self._inputs(f"lengths[{i}]", x, limits) for i, x in enumerate(ids)]
        run = QueryRun(self._passes, self._settings(), inputs, [])
        with Adaptation(self.model, run, SimpleNamespace(last_report=None)):  # no query's report
            pass

    @property
    def recorded_lengths(self) -> tuple[int, ...]:
        """The padded lengths whose passes the latest query or warm-up has kept, shortest first.

        A program that saves them can have :meth:`warmup` record them in its next run.

        >>> import hullkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> hullkit.TestTimeFinetuner(model).recorded_lengths
        ()
        """
        captured = self._passes.captured
        return () if captured is None else tuple(captured.lengths)

    def release(self) -> None:
        """Gives back the memory kept between queries: graphs, moments, the copy of the weights.

        The next query makes them anew. It tries again to capture a model that could not be
        captured.

        >>> import hullkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> hullkit.TestTimeFinetuner(model).release()
        """
        self._passes.release()


def _labels(name: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The labels of an example (1, T) without any. mask: (1, T), or of another rank."""
    if mask is None or mask.ndim != 2:
        return ids
    if mask.shape != ids.shape:
        expected, got = tuple(ids.shape), tuple(mask.shape)
        raise ValueError(f"{name}['attention_mask']: expected shape {expected}, got {got}")
    return ids.masked_fill((mask == 0).to(ids.device), IGNORED)
